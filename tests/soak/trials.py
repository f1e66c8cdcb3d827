"""Tries a command in a process of its own, and names how it ended: the outcomes that the tables of a soak count.

The process is a fork of this one, which has imported all that commands need: a trial costs milliseconds, not seconds.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

PATIENCE = 60.0
"""Seconds of the clock after which a trial is taken to hang. Machines are loaded at times."""

CPU_SECONDS = 5.0
"""Seconds of work that a trial may take beside reading its own files."""

READING = 100e6
"""Bytes a second at which a trial is taken to read its own files."""

MEMORY = 1_000_000_000
"""Bytes that a trial may take beside those of its own files."""

LOOK = 0.05
"""Seconds between two looks at a trial's memory."""


class Outcome(Enum):
    """How a trial ended; the value is its column's head."""

    DONE = "done"
    REFUSED = "refused"
    UNCLEAR = "unclear"
    TRACEBACK = "traceback"
    CRASH = "crash"
    HANG = "hang"
    MEMORY = "memory"
    UNCHECKED = "unchecked"
    """It was done, and should have been refused, or gave other bits than it should."""


PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that a process gets when its parent ends."""

GOOD = frozenset((Outcome.DONE, Outcome.REFUSED))


@dataclass(frozen=True)
class Ended:
    """A process that has ended, or was ended because it took too long or too much (`outcome` says so)."""

    outcome: Outcome
    code: int
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Trial:
    """One input, fault or kill.

    Attributes:
        kind: of the trial; the table has a row for each.
        name: tells the trial from the others of its kind, and how to make it again.
        ended: how it ended.
    """

    kind: str
    name: str
    ended: Ended

    @property
    def good(self) -> bool:
        return self.ended.outcome in GOOD


def attempt(function: Callable[[], int], read_bytes: int = 0, patience: float = PATIENCE) -> Ended:
    """Runs a function in a fork, with its output caught; returns how that ended.

    Args:
        function: returns an exit code.
        read_bytes: size of the files that it may read whole.
        patience: seconds after which it is ended.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        own, begun = psutil.Process().memory_info().rss, time.monotonic()
        pid = os.fork()
        if not pid:
            _run(function, out.fileno(), err.fileno())
        why, peak = _wait(pid, begun + patience, own, read_bytes)
        _, status, usage = os.wait4(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        texts = [file.read().decode(errors="replace") for file in (out, err)]
    cpu = usage.ru_utime + usage.ru_stime
    if why is None and cpu > CPU_SECONDS + read_bytes / READING:
        why = Outcome.HANG
    peak = max(peak, usage.ru_maxrss * 1024 - own)
    if why is None and peak > MEMORY + read_bytes:
        why = Outcome.MEMORY
    return Ended(why or judge(code, *texts), code, *texts, time.monotonic() - begun, cpu, peak)


def warm(model: str | os.PathLike[str]) -> None:
    """Plans and loads a model in this process, so that forks find all libraries imported, and no thread is needed."""
    import torch

    import distquant as dq
    from distquant.cli import commands, launch  # noqa: F401

    torch.set_num_threads(1)
    for method in ("nf4", "none"):
        dq.load(model, quantization_config=method)


def command(*argv: str) -> Callable[[], int]:
    """Returns a function that runs a command line."""

    def run() -> int:
        from distquant.cli.main import main

        return main(argv)

    return run


def judge(code: int, out: str, err: str) -> Outcome:
    """Returns the outcome of a command that ended by itself."""
    if "Traceback (most recent call last)" in err + out:
        return Outcome.TRACEBACK
    if code < 0:
        return Outcome.CRASH
    if code == 0:
        return Outcome.DONE
    said = [line for line in err.splitlines() if not re.match(r"(status|loading): |distquant: note: ", line)]
    clear = code in (1, 2) and said and said[0].startswith("distquant: ")
    # Control characters of a checkpoint must not reach the terminal.
    return Outcome.REFUSED if clear and re.fullmatch(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f]*", err) else Outcome.UNCLEAR


def table(trials: Iterable[Trial]) -> str:
    """Returns a table in Markdown: a row for each kind, a column for each outcome."""
    counts: dict[str, Counter[Outcome]] = {}
    for trial in trials:
        counts.setdefault(trial.kind, Counter())[trial.ended.outcome] += 1
    total = sum(counts.values(), Counter())
    head = [outcome for outcome in Outcome if total[outcome] or outcome is not Outcome.UNCHECKED]
    lines = ["| kind | tried | " + " | ".join(outcome.value for outcome in head) + " |", "|---" * (len(head) + 2) + "|"]
    for kind, count in [*sorted(counts.items()), ("all", total)]:
        cells = [str(count.total()), *(str(count[outcome]) for outcome in head)]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def failures(trials: Sequence[Trial]) -> Iterator[str]:
    """Yields, for each trial that ended badly, what one must know to try it again."""
    for trial in trials:
        if not trial.good:
            ended = trial.ended
            yield (
                f"{trial.kind}: {trial.name}: {ended.outcome.value}, exit code {ended.code}, {ended.seconds:.1f} s, "
                f"{ended.cpu_seconds:.1f} s of work, {ended.peak_bytes / 1e6:.0f} MB more\n{ended.err[-1500:]}"
            )


def bytes_of(folder: Path) -> int:
    """Returns the size of all regular files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _run(function: Callable[[], int], out: int, err: int) -> None:
    """Runs in the fork, and ends it."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a harness that is stopped leaves no trial behind
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    # pytest and others may have put something else in their place.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code = 70
    try:
        code = function()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)  # whatever else fails: a fork that went on would be a second one of this process


def _wait(pid: int, deadline: float, own: int, read_bytes: int) -> tuple[Outcome | None, int]:
    """Waits for a fork's end, or ends it and says why; returns the most memory that was seen beyond this process's."""
    peak, handle = 0, os.pidfd_open(pid)
    try:
        while not select.select([handle], [], [], LOOK)[0]:
            try:
                peak = max(peak, psutil.Process(pid).memory_info().rss - own)
            except psutil.Error:
                continue
            over = peak > MEMORY + read_bytes
            if over or time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                return (Outcome.MEMORY if over else Outcome.HANG), peak
        return None, peak
    finally:
        os.close(handle)
