"""Fuzzes what a checkpoint or a user may give: headers, index, configs, GGUF, quant_state, tokenizer files, options.

    python tests/soak/fuzz.py --seconds 60 --seed 1

Each input has a seed of its own, by which it can be made again: `--seed N --trials 1` tries one alone. What failed is
printed with that seed; `--keep FOLDER` writes the changed file there, for the corpus.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import trials
from corpus import keep_input
from hostile_configs import BNB, QUANTIZED
from hostile_headers import GGUF, INDEX, SHARD, header_of, with_header
from mutations import Mutator
from spoiled import DATA, KJV, PROMPT, Input, ready, tried, write

PLAN, LOAD = ("plan", "MODEL"), ("load", "MODEL")
TALK = ("load", "MODEL", *PROMPT)


def header(mutator: Mutator, folder: Path, name: str = SHARD) -> None:
    """Changes the header of a safetensors file, as JSON or as bytes."""
    document, data = header_of(folder / name)
    raw = json.dumps(document).encode()
    if mutator.random.random() < 0.7:
        with_header(folder / name, mutator.json_text(document).encode(errors="surrogateescape"), data)
    else:
        write(folder / name, mutator.bytes(len(raw).to_bytes(8, "little") + raw + data, 8 + len(raw)))


def document(name: str, mutator: Mutator, folder: Path) -> None:
    """Changes a JSON file."""
    text = mutator.json_text(json.loads((folder / name).read_text()))
    write(folder / name, text.encode(errors="surrogateescape"))


def quantization(mutator: Mutator, folder: Path) -> None:
    """Changes the quantization_config alone."""
    whole = json.loads((folder / "config.json").read_text())
    changed = mutator.json_text(whole.get("quantization_config", BNB))
    text = json.dumps({**whole, "quantization_config": "CHANGED"}).replace('"CHANGED"', changed)
    write(folder / "config.json", text.encode(errors="surrogateescape"))


def gguf(mutator: Mutator, folder: Path) -> None:
    """Changes bytes of a GGUF header."""
    write(folder / GGUF.name, mutator.bytes(GGUF.read_bytes(), 1500))


def quant_state(mutator: Mutator, folder: Path) -> None:
    """Changes the quant_state of a weight that bitsandbytes has stored, in a checkpoint that holds one."""
    file = folder / "model.safetensors"
    stored, data = header_of(file)
    name = mutator.random.choice([name for name in stored if "quant_state" in name])
    begin, end = stored[name]["data_offsets"]
    text = mutator.json_text(json.loads(data[begin:end])).encode(errors="surrogateescape")
    # The tensor keeps its size, so that the header stays right: JSON may end in spaces.
    with_header(file, json.dumps(stored), data[:begin] + text[: end - begin].ljust(end - begin) + data[end:])


OPTIONS = (
    "--quant",
    "--mesh",
    "--tp",
    "--dp",
    "--ep",
    "--dtype",
    "--device-map",
    "--max-memory",
    "--staging",
    "--capability",
    "--context",
    "--batch",
    "--revision",
    "--on-unsupported",
    "--attn-implementation",
    "--dispatch",
    "--ranks-per-node",
    "--device",
)
GOOD = (
    "nf4",
    "tp=2",
    "2",
    "auto",
    "24GiB",
    "9.0",
    "bfloat16",
    '{"0": "1GiB"}',
    "main",
    "skip",
    "sdpa",
    "int4-g64",
    "cpu",
    "dp=2,tp=2",
    BNB,
)


def options(mutator: Mutator) -> tuple[str, ...]:
    """Returns a command line with a few options of odd values."""
    words = list(PLAN)
    for _ in range(mutator.random.choice((1, 1, 2, 3))):
        value = mutator.random.choice(GOOD)
        text = mutator.json_text(value) if isinstance(value, dict) or mutator.random.random() < 0.3 else value
        if mutator.random.random() < 0.4:
            text = (
                mutator.text()
                if mutator.random.random() < 0.5
                else mutator.bytes(text.encode()).decode(errors="surrogateescape")
            )
        words.append(f"{mutator.random.choice(OPTIONS)}={text}".replace("\0", "").encode(errors="replace").decode())
    return tuple(words)


def bitsandbytes_model(root: Path) -> Path:
    """Returns the example as bitsandbytes stores it in 4 bits; it is written when it is first asked for."""
    target = root / "bnb"
    if not target.exists():
        import distquant as dq

        dq.load(KJV, quantization_config="nf4").save_pretrained(target)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (target / name).symlink_to(KJV / name)
    return target


def made(seed: int, root: Path) -> Input:
    """Returns the input of a seed; `root` is a folder for checkpoints that are made first."""
    mutator = Mutator(seed)
    quantized = DATA / mutator.random.choice(QUANTIZED)
    kinds: dict[str, Callable[[], tuple[Path, Callable[[Path], None], tuple[tuple[str, ...], ...]]]] = {
        "safetensors header": lambda: (KJV, partial(header, mutator), (PLAN, LOAD)),
        "index": lambda: (KJV, partial(document, INDEX, mutator), (PLAN, LOAD)),
        "config.json": lambda: (KJV, partial(document, "config.json", mutator), (PLAN, TALK)),
        "quantization_config": lambda: (quantized, partial(quantization, mutator), (PLAN, LOAD)),
        "bitsandbytes config": lambda: (bitsandbytes_model(root), partial(quantization, mutator), (PLAN, LOAD)),
        "stored header": lambda: (quantized, partial(header, mutator, name="model.safetensors"), (PLAN, LOAD)),
        "GGUF": lambda: (GGUF, partial(gguf, mutator), (PLAN, LOAD)),
        "quant_state": lambda: (bitsandbytes_model(root), partial(quant_state, mutator), (PLAN, LOAD)),
        "generation_config.json": lambda: (KJV, partial(document, "generation_config.json", mutator), (PLAN, TALK)),
        "tokenizer_config.json": lambda: (KJV, partial(document, "tokenizer_config.json", mutator), (TALK,)),
        "option": lambda: (KJV, lambda folder: None, (options(mutator),)),
    }
    kind = mutator.random.choice(sorted(kinds))
    base, spoil, commands = kinds[kind]()
    return Input(kind, f"seed {seed}", base, spoil, commands)


def fuzzed(seed: int, root: Path, seconds: float, count: int, keep: Path | None = None) -> Iterator[trials.Trial]:
    """Yields trials from a seed on, until `seconds` have passed or `count` have been made."""
    until = time.monotonic() + seconds
    for number in range(seed, seed + count):
        if time.monotonic() > until:
            return
        given = made(number, root)
        (trial,) = tried([given], root / f"copy{number}")
        (root / f"copy{number}").rmdir()
        if not trial.good and keep is not None:
            keep_input(made(number, root), keep / f"seed-{number}")
        yield trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=1, help="of the first input; each next one has the next")
    parser.add_argument("--trials", type=int, default=10**9, help="inputs, at most")
    parser.add_argument("--keep", type=Path, help="folder for the files of what failed")
    given = parser.parse_args()
    ready()
    done: list[Any] = []
    with tempfile.TemporaryDirectory() as root:
        for trial in fuzzed(given.seed, Path(root), given.seconds, given.trials, given.keep):
            done.append(trial)
            print(*trials.failures([trial]), sep="\n", end="", flush=True)
    print(trials.table(done))
    return int(not all(trial.good for trial in done))


if __name__ == "__main__":
    sys.exit(main())
