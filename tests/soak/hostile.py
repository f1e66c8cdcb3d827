"""Hand-made hostile inputs, by kind: each is tried in a fork, and a table tells how they ended.

python tests/soak/hostile.py [--every N] [--kind TEXT]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import trials
from hostile_arguments import arguments, folders, quant_json
from hostile_configs import configs, quantization_configs, sidecars
from hostile_headers import ggufs, headers, indices
from hostile_tokenizers import adapters, tokenizers
from spoiled import Input, ready, tried


def inputs(model_of: Callable[[str], str]) -> Iterator[Input]:
    """Yields all of them; `model_of` gives the folder of a family of `models.py`."""
    yield from configs(model_of)
    for group in (
        quantization_configs,
        sidecars,
        tokenizers,
        adapters,
        headers,
        indices,
        ggufs,
        arguments,
        quant_json,
        folders,
    ):
        yield from group()


def families(root: Path) -> Callable[[str], str]:
    """Returns a function that gives the folder of a family, which is written when it is first asked for."""
    from models import save_model

    return lambda family: str(root / family if (root / family).exists() else save_model(family, root / family))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--every", type=int, default=1, help="try each Nth input alone")
    parser.add_argument("--kind", default="", help="only kinds whose names have this text in them")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    ready()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [one for one in inputs(families(Path(folder) / "models")) if given.kind in one.kind][:: given.every]
        done = []
        for trial in tried(chosen, Path(folder) / "copies", progress=True):
            done.append(trial)
            print(*trials.failures([trial]), sep="\n", end="", flush=True)
    print(trials.table(done))
    return int(not all(trial.good for trial in done))


if __name__ == "__main__":
    sys.exit(main())
