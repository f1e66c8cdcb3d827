"""Faults of files and machines under a command: each is refused in clear words, or the bits are exactly the right ones.

    python tests/soak/faults.py [SEED]

Faults come before the command, between the headers and the weights, or at some read of the weights. Mounts need root;
without it they are passed over, and said so.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fault_outputs
from fault_files import AT_A_READ, BEFORE, BETWEEN, SHARDS
from fault_limits import LIMITS, as_nobody
from fault_reads import READS, at_read, before_opening
from trials import Ended, Outcome, Trial, attempt, command, failures, table, warm

MODEL = Path(__file__).parents[2] / "examples/models/kjv-tiny"

FINGERPRINT = re.compile(r"\bfingerprint\s+([0-9a-f]{32})\b")

PATIENCE = 30.0
"""Seconds of the clock after which a trial hangs: each takes one, and those with passing errors four."""

QUANT = ("--quant", "nf4")

SMALL = ("--staging", "1MiB")
"""Makes a load of many reads."""


def faults(seed: int, share: float = 1.0) -> list[Trial]:
    """Returns the trials of all faults, or of a random share of each kind.

    Args:
        seed: of places, times and files.
        share: 1.0 tries all of them.
    """
    random_ = random.Random(seed)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        place.chmod(0o755)
        reference = attempt(command("load", str(MODEL), *QUANT))
        right = _fingerprint(reference)
        assert right is not None, reference
        every = list(_every(place, random_))
        if share < 1:
            every = [each for each in every if random_.random() < share]
        return [_tried(kind, name, run, place, right) for kind, name, run in every]


Faulty = tuple[str, str, Callable[[Path], Callable[[], int]]]
"""Kind, name, and what makes the function to try of a fresh copy of the model."""


def _every(place: Path, random_: random.Random) -> Iterator[Faulty]:
    for name, change in BEFORE.items():
        file = random_.choice(SHARDS)
        yield "files, before", f"{name} ({file})", _before(change, file, random_.random())
    for io in ("buffered", "direct"):
        for name, change in BETWEEN.items():
            file = random_.choice(SHARDS)
            yield "files, between header and opening", f"{name} ({file}, {io})", _between(change, file, io)
        for name, change in AT_A_READ.items():
            file, number = random_.choice(SHARDS), random_.randrange(1, 12)
            yield "files, at a read", f"{name} ({file}, read {number}, {io})", _at_read(change, file, number, io)
        for name, install in READS.items():
            yield "reads", f"{name} ({io})", _reads(install, io)
    for name, install in LIMITS.items():
        yield "limits of the machine", name, _limited(install)
    for name, make in fault_outputs.OUTPUTS.items():
        for option in fault_outputs.OPTIONS:
            yield "outputs", f"{option} {name}", fault_outputs.written(option, make, QUANT)
    for name, make in fault_outputs.REFERENCES.items():
        yield "cache", name, fault_outputs.cached(make)


def _before(change: Callable[[Path, float], None], file: str, where: float) -> Callable[[Path], Callable[[], int]]:
    def made(model: Path) -> Callable[[], int]:
        change(model / file, where)
        return as_nobody(command("load", str(model), *QUANT))

    return made


def _between(change: Callable[[Path], None], file: str, io: str) -> Callable[[Path], Callable[[], int]]:
    return lambda model: before_opening(
        lambda: change(model / file), command("load", str(model), *QUANT, *SMALL, "--io", io)
    )


def _at_read(change: Callable[[Path], None], file: str, number: int, io: str) -> Callable[[Path], Callable[[], int]]:
    return lambda model: at_read(
        number, lambda: change(model / file), command("load", str(model), *QUANT, *SMALL, "--io", io)
    )


def _reads(install: Callable[[], None], io: str) -> Callable[[Path], Callable[[], int]]:
    return lambda model: _first(install, command("load", str(model), *QUANT, *SMALL, "--io", io))


def _limited(install: Callable[[], None]) -> Callable[[Path], Callable[[], int]]:
    return lambda model: _first(install, command("load", str(model), *QUANT))


def _first(install: Callable[[], None], run: Callable[[], int]) -> Callable[[], int]:
    def both() -> int:
        install()
        return run()

    return both


def _tried(kind: str, name: str, make: Callable[[Path], Callable[[], int]], place: Path, right: str) -> Trial:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        Path(folder).chmod(0o777)
        model = Path(shutil.copytree(MODEL, Path(folder) / "model"))
        model.chmod(0o755)
        ended = attempt(make(model), patience=PATIENCE)
        fault_outputs.unmount(Path(folder))
    trial = Trial(kind, name, judged(ended, right))
    for text in failures((trial,)):
        print(text, flush=True)
    return trial


def judged(ended: Ended, right: str) -> Ended:
    """Returns the end of a trial, which is unchecked where it loaded other bits."""
    found = _fingerprint(ended)
    wrong = ended.outcome is Outcome.DONE and found is not None and found != right
    return replace(ended, outcome=Outcome.UNCHECKED) if wrong else ended


def _fingerprint(ended: Ended) -> str | None:
    found = FINGERPRINT.search(ended.out)
    return None if found is None else found[1]


def main(arguments: Sequence[str]) -> int:
    """Prints every failure, and the table; returns 1 if there is one."""
    warm(MODEL)
    tried = faults(int(arguments[0]) if arguments else 0)
    print(table(tried))
    if os.geteuid() != 0:
        print("passed over without root: mounts, and permissions of another user")
    return int(not all(trial.good for trial in tried))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
