"""Stops and kills ranks and launchers at random moments of a load, and sees how that ends: a table of a soak.

    python tests/soak/kills.py --count 60 --seed 0

Each trial runs the command line on real processes. It reports how long the command took to end, whether the right rank
was named, whether anything was left behind, and whether the next load is right.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import psutil

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "kjv-tiny"

TIMEOUT = 10
"""Seconds of the load's `--timeout`."""

ALLOWED = 5.0
"""Seconds beside these that a command may take to end on a quiet machine."""

PATIENCE = 150.0
"""Seconds after which a command is taken to hang."""

VANISH = 5.0
"""Seconds that processes may take to vanish after their launcher."""

MARK = "DISTQUANT_KILLS"
"""Environment variable that marks the processes of a trial."""

ANSWER = ("--prompt", "In the beginning", "--max-new-tokens", "150")

RUNTIMES = {
    "distquant": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "ray": [],
}
"""How ranks are started -> what stands before `-m distquant`."""

RANK_SIGNALS = (signal.SIGSTOP, signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LAUNCHER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP)
"""Those of torchrun's launcher are torch's own matter."""


@dataclass(frozen=True)
class KillTrial:
    """One kill or stop.

    Attributes:
        runtime: a key of `RUNTIMES`.
        victim: "launcher" or the rank.
        number: the signal.
        moment: share of the time from the first chance to the end of an undisturbed load.
        doing: the last status that the command showed before.
        seconds: from the signal to the command's end; `PATIENCE` if it did not end.
        code: its exit code.
        said: its message.
        missed: True if the command had ended before the signal, or ended well in spite of it.
        named: True if the right rank, or signal, is named.
        left: processes, folders and files that were left behind.
        next_right: True if the next load gave the right fingerprint.
    """

    runtime: str
    victim: str
    number: Signals
    moment: float
    doing: str
    seconds: float
    code: int | None
    said: str
    missed: bool
    named: bool
    left: tuple[str, ...]
    next_right: bool

    @property
    def limit(self) -> float:
        """Seconds that it may take."""
        return ALLOWED + (TIMEOUT if self.number == signal.SIGSTOP else 0)

    @property
    def good(self) -> bool:
        """True but for the time, which depends on the machine; a hang is not good."""
        return (self.named or self.missed) and not self.left and self.next_right and self.seconds < PATIENCE


@dataclass
class _Run:
    """A command that runs, in a temporary folder of its own."""

    runtime: str
    process: subprocess.Popen[bytes]
    mark: str
    folder: str
    begun: float

    def text(self, name: str = "err") -> str:
        return Path(self.folder, name).read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All processes of the run, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[str, psutil.Process]:
        """The ranks, by their number; those of Ray, which have none outside, by their process's."""
        found = {}
        for process in self.processes():
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if self.runtime == "ray":
                    if words.startswith("ray::Worker"):
                        found[f"process {process.pid}"] = process
                elif "distquant" in words and "RANK" in (environment := process.environ()):
                    found[environment["RANK"]] = process
        return found


@contextmanager
def _running(runtime: str) -> Iterator[_Run]:
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        own = ["-m", "distquant", "load", str(MODEL), "--quant", "nf4", "--mesh", "tp=2", "--timeout", str(TIMEOUT)]
        own += [*ANSWER, *(["--runtime", "ray"] if runtime == "ray" else [])]
        environment = {**os.environ, MARK: mark, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        with open(Path(folder, "out"), "wb") as out, open(Path(folder, "err"), "wb") as err:
            process = subprocess.Popen(
                [sys.executable, *RUNTIMES[runtime], *own],
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )
        run = _Run(runtime, process, mark, folder, time.monotonic())
        try:
            yield run
        finally:
            for each in run.processes():
                with suppress(psutil.Error):
                    each.kill()
            process.wait()


def fingerprint_of(text: str) -> str:
    """Returns the fingerprint that a load has shown, or nothing."""
    found = re.search(r"^fingerprint (\w+)", text, re.M)
    return found[1] if found else ""


def undisturbed(runtime: str) -> tuple[float, float, str]:
    """Returns seconds until there are ranks, and until the end, of a load; and its fingerprint."""
    with _running(runtime) as run:
        ranks_at = None
        while run.process.poll() is None:
            if ranks_at is None and len(run.ranks()) == 2:
                ranks_at = time.monotonic() - run.begun
            time.sleep(0.05)
        seconds = time.monotonic() - run.begun
        fingerprint = fingerprint_of(run.text("out"))
        if run.process.returncode or not fingerprint or ranks_at is None:
            raise RuntimeError(run.text())
        return ranks_at, seconds, fingerprint


def shared_memory() -> set[str]:
    """Returns the files in the machine's shared memory that ranks could have made."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if path.name.startswith(("distquant", "torch_", "plasma"))}


def kill(
    runtime: str,
    victim: str,
    number: Signals,
    moment: float,
    usual: tuple[float, float, str],
    load_again: bool = True,
) -> KillTrial:
    """Makes one trial.

    Args:
        runtime: a key of `RUNTIMES`.
        victim: "launcher", "0" or "1".
        number: the signal.
        moment: share of the time in which there is a victim.
        usual: as `undisturbed` returns it.
        load_again: look whether the next load is right; else it is taken to be.
    """
    ranks_at, seconds, fingerprint = usual
    first = 0.5 if victim == "launcher" else ranks_at
    before = shared_memory()
    with _running(runtime) as run:
        while victim != "launcher" and len(run.ranks()) < 2 and run.process.poll() is None:
            time.sleep(0.02)
        time.sleep(max(run.begun + first - time.monotonic(), 0) if victim == "launcher" else 0)
        time.sleep(moment * (seconds - first))
        pid, name = run.process.pid, victim
        if victim != "launcher":
            ranks = run.ranks()
            name = sorted(ranks)[int(victim)] if len(ranks) == 2 else ""
            pid = ranks[name].pid if name else pid
        doing = _statuses(run.text())
        over = run.process.poll() is not None or not name
        begun = time.monotonic()
        if not over:
            with suppress(ProcessLookupError):  # it ends just now
                os.kill(pid, number)
        code = _end(run, number if victim == "launcher" else None, begun)
        took = time.monotonic() - begun
        left = _left(run, before)
        said = "\n".join(line for line in run.text().splitlines() if line.startswith("distquant: ")).strip()
        missed = over or code == 0
        named = not missed and _named(name, number, code, run.text(), said)
    next_right = not load_again or loads_right(runtime, fingerprint)
    victim = victim if victim == "launcher" else f"rank {victim}"
    return KillTrial(runtime, victim, number, moment, doing, took, code, said, missed, named, left, next_right)


def loads_right(runtime: str, fingerprint: str) -> bool:
    """Returns True if an undisturbed load ends well, with this fingerprint."""
    with _running(runtime) as run:
        with suppress(subprocess.TimeoutExpired):
            run.process.wait(PATIENCE)
        return run.process.returncode == 0 and fingerprint_of(run.text("out")) == fingerprint


def _statuses(text: str) -> str:
    lines = re.findall(r"^(?:status|loading): (.*?)(?: \(\d+ s\))?$", text, re.M)
    return lines[-1] if lines else ""


def _end(run: _Run, number: Signals | None, begun: float) -> int | None:
    """Returns the exit code; lets a launcher that was stopped go on after the timeout. None: it did not end."""
    if number == signal.SIGSTOP:
        time.sleep(TIMEOUT)
        run.process.send_signal(signal.SIGCONT)
    try:
        return run.process.wait(max(begun + PATIENCE - time.monotonic(), 1))
    except subprocess.TimeoutExpired:
        return None


def _named(name: str, number: Signals, code: int | None, text: str, said: str) -> bool:
    """Returns True if the message is right for a load that did not end well."""
    if "Traceback" in said or code is None:
        return False
    if name == "launcher":
        if number in (signal.SIGINT, signal.SIGTERM):
            line = {signal.SIGINT: "distquant: ended by Ctrl-C", signal.SIGTERM: "distquant: ended by SIGTERM"}[number]
            return "Traceback" not in text and said == line and code == 128 + number
        return (number == signal.SIGSTOP and code == 2) or code == -number
    if number == signal.SIGSTOP:
        return "silent" in said and (name in said if name.startswith("process") else f"rank {name} " in said)
    # On Ray the harness does not know which rank a process is: one must be named.
    return bool(re.search(r"rank \d" if name.startswith("process") else rf"rank {name}\b", said or text))


def _left(run: _Run, shared_before: set[str]) -> tuple[str, ...]:
    """Returns what a run has left behind once its command has ended."""
    deadline = time.monotonic() + VANISH
    while True:
        found = [f"process {process.pid}" for process in run.processes()]
        found += [name for name in os.listdir(run.folder) if name.startswith("distquant")]
        found += sorted(shared_memory() - shared_before)
        if not found or time.monotonic() > deadline:
            return tuple(found)
        time.sleep(0.1)


def kills(count: int, seed: int) -> list[KillTrial]:
    """Makes so many trials; the same seed gives the same victims, signals and moments."""
    chance, trials = random.Random(seed), []
    usual = {}
    for number in range(count):
        runtime = list(RUNTIMES)[number % len(RUNTIMES)]
        at_launcher = runtime != "torchrun" and chance.random() < 0.4
        victim = "launcher" if at_launcher else chance.choice("01")
        what = chance.choice(LAUNCHER_SIGNALS if at_launcher else RANK_SIGNALS)
        moment = chance.uniform(0.0, 0.9)
        if runtime not in usual:
            usual[runtime] = undisturbed(runtime)
        trials.append(kill(runtime, victim, what, moment, usual[runtime]))
    return trials


def table(trials: list[KillTrial]) -> str:
    """Returns a table in Markdown: a row for each runtime, kind of victim and signal."""
    rows: dict[tuple[str, str, str], list[KillTrial]] = {}
    for trial in trials:
        victim = "rank" if trial.victim.startswith("rank") else "launcher"
        rows.setdefault((trial.runtime, victim, trial.number.name), []).append(trial)
    heads = ["runtime", "victim", "signal", "tried", "missed", "longest", "named", "nothing left", "next right"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, each in sorted(rows.items()):
        longest = max((trial.seconds for trial in each if not trial.missed), default=0.0)
        counts = [sum(trial.named for trial in each), sum(not trial.left for trial in each)]
        counts.append(sum(trial.next_right for trial in each))
        cells = [*key, len(each), sum(trial.missed for trial in each), f"{longest:.1f} s", *counts]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trials = kills(arguments.count, arguments.seed)
    print(table(trials))
    for trial in trials:
        if not trial.good or trial.seconds > trial.limit:
            print(trial)
    return 0 if all(trial.good for trial in trials) else 1


if __name__ == "__main__":
    raise SystemExit(main())
