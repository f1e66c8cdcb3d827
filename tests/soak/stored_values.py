"""Loads quantized checkpoints with one stored value spoilt: `python tests/soak/stored_values.py [BASE ...] [gguf]`.

Prints a table of how the loads ended, by checkpoint, and what went wrong. A value that a kernel would take for another
number, and that loads, is counted as unchecked; so is a legal one that is refused.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]  # as pytest has it

import spoilt_values  # noqa: E402
import trials  # noqa: E402
from spoilt_values import BASES, Case  # noqa: E402
from trials import Outcome, Trial  # noqa: E402


def judged(case: Case, path: Path, names: tuple[str, ...]) -> Trial:
    """Loads a spoilt checkpoint, and judges how that ended; a refusal has one of these names."""
    nbytes = path.stat().st_size if path.is_file() else trials.bytes_of(path)
    ended = trials.attempt(trials.command("load", str(path)), nbytes)
    if ended.outcome in trials.GOOD:
        done = ended.outcome is Outcome.DONE
        if done != case.legal:
            ended = replace(ended, outcome=Outcome.UNCHECKED)
        elif not done and not any(name in ended.err for name in names):
            ended = replace(ended, outcome=Outcome.UNCLEAR)
    return Trial(case.base, f"{case.suffix}: {case.name}", ended)


def run(model: str, bases: Iterable[str], root: Path) -> Iterator[Trial]:
    """Yields the trials of these checkpoints, and with "gguf" those of GGUF files.

    Args:
        model: an unquantized checkpoint, for methods without data beside the tests.
        bases: their names.
        root: an empty folder.
    """
    trials.warm(model)
    target = root / "spoilt"
    for number, base in enumerate(bases):
        if base == "gguf":
            yield from _gguf(root)
            continue
        folder = spoilt_values.write_base(base, model, root / f"base{number}")
        for case in spoilt_values.cases(base):
            module = spoilt_values.spoilt(folder, case, target)
            yield judged(case, target, (module,))
            shutil.rmtree(target)


def _gguf(root: Path) -> Iterator[Trial]:
    import models
    from ggufs import write_gguf

    # K-types have blocks of 256.
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    models.FAMILIES["wide"] = ("llama", wide)
    try:
        model = models.save_model("wide", root / "wide")
    finally:
        models.FAMILIES.pop("wide")
    files: dict[str, Path] = {}
    for case, offset in spoilt_values.gguf_cases():
        if case.base not in files:
            files[case.base] = write_gguf(model, root / f"{case.base}.gguf", case.base)
        target = root / "spoilt.gguf"
        spoilt_values.spoilt_gguf(files[case.base], case, offset, target)
        yield judged(case, target, ("mlp.down_proj", "embed_tokens"))


def main() -> int:
    from models import save_model

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = str(save_model("llama-gqa", root / "model"))
        found = []
        for trial in run(model, sys.argv[1:] or [*BASES, "gguf"], root):
            found.append(trial)
            for line in trials.failures([trial]):
                print(line, flush=True)
    print(trials.table(found))
    return int(not all(trial.good for trial in found))


if __name__ == "__main__":
    sys.exit(main())
