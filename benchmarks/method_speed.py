"""The command `methods.py speed`: loads of distquant beside the library that a method comes from."""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

from common import SMALL, slug, table, write
from contestants import Contestant, Measured
from load import gigabytes, seconds_of, verdict
from method_pages import about, check_known, today
from peers import PEERS, STORED, WITHOUT, store
from ranks import one_run

STORED_PREFIX = "stored:"
NAMES = (*(name for name in PEERS if not name.startswith("stored")), *(STORED_PREFIX + name for name in STORED))


@dataclass(frozen=True)
class Match:
    """distquant at two widths and the library, over one checkpoint; and the minimum for any loader."""

    name: str
    path: str
    how: str
    contestants: tuple[Contestant, Contestant, Contestant]
    copying: Contestant | None
    """The floor of a stored checkpoint: its bytes are only read into memory."""

    @property
    def all(self) -> tuple[Contestant, ...]:
        return self.contestants if self.copying is None else (*self.contestants, self.copying)


def match(name: str, path: str, work: str, io: str) -> Match:
    """Returns the contestants under a name of `NAMES`; makes the stored checkpoints that they need."""
    cores = os.cpu_count() or 1
    stored = name.startswith(STORED_PREFIX)
    method = name.removeprefix(STORED_PREFIX)
    small = ""
    quant, peer = method, method
    if stored:
        quant, peer = "", "stored quanto" if method.startswith("quanto") else "stored"
        path, small = store(path, method, work), store(str(SMALL), method, work)
    ours = [
        Contestant(f"{name} distquant tp={tp}", "distquant", quant, tp, max(1, cores // tp), small=small, io=io)
        for tp in (1, 2)
    ]
    theirs = Contestant(f"{name} upstream", "upstream", quant, 1, cores, peer=peer, small=small)
    copying = Contestant(f"{name} copying", "copy", quant, 1, cores, small=small) if stored else None
    return Match(name, path, PEERS[peer].how, (ours[0], ours[1], theirs), copying)


Runs = dict[str, list[list[Measured]]]
"""Figures of every rank of every run, by the contestant's name."""


def alternate(matches: list[Match], count: int) -> tuple[Runs, dict[str, str]]:
    """Returns all runs, and the failures of contestants, which are not run again."""
    runs: Runs = {contestant.name: [] for each in matches for contestant in each.all}
    failed: dict[str, str] = {}
    for number in range(count):
        for each in matches:
            for contestant in each.all:
                if contestant.name in failed:
                    continue
                try:
                    run = one_run(each.path, contestant)
                except SystemExit as error:
                    failed[contestant.name] = str(error)
                    print(f"FAILED  {error}", flush=True)
                    continue
                runs[contestant.name].append(run)
                seconds = seconds_of([run])[0]
                print(f"run {number + 1}/{count}  {contestant.name:40} {seconds:8.3f} s", flush=True)
    return runs, failed


def speed_row(each: Match, runs: Runs, failed: dict[str, str]) -> list[str]:
    """Returns the cells of a method: medians, their ratios, the verdict, and memory; empty if a side failed."""
    measured = [[] if c.name in failed else runs[c.name] for c in each.contestants]
    medians = [statistics.median(seconds_of(one)) if one else None for one in measured]
    tp1, tp2, theirs = medians
    ratios = [ours / theirs if ours is not None and theirs is not None else None for ours in (tp1, tp2)]
    known = [ratio for ratio in ratios if ratio is not None]
    alone = runs[each.copying.name] if each.copying is not None and each.copying.name not in failed else []
    copying = statistics.median(seconds_of(alone)) if alone else None
    return [
        each.name,
        *("failed" if median is None else f"{median:.3f}" for median in medians),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        verdict(max(known) <= 1) if len(known) == len(ratios) else "",
        "" if copying is None else f"{copying:.3f}",
        "" if copying is None or theirs is None else f"{copying / theirs:.2f}",
        *(gigabytes(one, "memory") if one else "" for one in measured),
        each.how,
    ]


def speed_page(
    path: str, command: str, matches: list[Match], runs: Runs, failed: dict[str, str], load: float, count: int
) -> str:
    """Formats the page: the measurement, a line for each method, the spread, and methods without figures."""
    heads = ["method", "distquant tp=1, median s", "tp=2, median s", "upstream, median s"]
    heads += ["tp=1 / upstream", "tp=2 / upstream", "bar: not slower than upstream"]
    heads += ["copying alone, median s", "copying / upstream"]
    heads += ["peak memory GB tp=1", "tp=2", "upstream", "upstream is"]
    cores = os.cpu_count() or 1
    parts = [
        f"# Loading {Path(path).name} by method, {today()}",
        about(path, load),
        f"Command: `{command}`; {count} of each, in turns.\n"
        "A ratio below 1: distquant took less time than upstream, the method's own library.",
        table(heads, [speed_row(each, runs, failed) for each in matches]),
        ranges(matches, runs),
    ]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(f"- {shortened(reason)}" for reason in failed.values()))
    parts += [
        "No row:\n\n" + "\n".join(f"- {method}: {why}." for method, why in WITHOUT.items()),
        "Seconds are medians of those of the slowest rank, from the call of the load to the assembled model;\n"
        "processes started, imports done, the small example model loaded, files in the page cache. tp=1 and upstream:\n"
        f"one process with {cores} threads; tp=2: two with {max(1, cores // 2)}. The bar is met where neither\n"
        "distquant tp=1 nor tp=2 took longer. `stored:` is a checkpoint that upstream quantized and saved;\n"
        "every byte of what is loaded from it is read once within the time, because upstream maps files, and so does\n"
        "distquant with --io mapped and, where they are in the page cache, with --io auto.\n"
        "Copying alone: all bytes of the files read from the page cache into new memory (huge pages), by a thread for\n"
        "each core, and touched. No loader is faster whose weights are in memory of its own, as distquant's are with\n"
        "--io buffered.\n"
        "Peak memory: resident memory over that before the load, summed over the processes\n"
        "(pages of mapped files count). Upstream loads in bfloat16 and quantizes the same linears.",
    ]
    return "\n\n".join(parts) + "\n"


def shortened(reason: str) -> str:
    """Shortens an error to a line."""
    return textwrap.shorten(reason, 300, placeholder=" ...")


def ranges(matches: list[Match], runs: Runs) -> str:
    rows = []
    for each in matches:
        cells = [seconds_of(runs[contestant.name]) for contestant in each.all]
        cells += [[]] if each.copying is None else []
        rows.append([each.name, *(f"{min(one):.3f} - {max(one):.3f}" if one else "" for one in cells)])
    return table(["range of seconds", "distquant tp=1", "tp=2", "upstream", "copying alone"], rows)


def speed(arguments: argparse.Namespace) -> int:
    path = os.path.abspath(arguments.checkpoint)
    check_known(arguments.only, NAMES)
    os.makedirs(arguments.work, exist_ok=True)
    load = os.getloadavg()[0]
    matches, not_made = [], {}
    for name in [name for name in NAMES if not arguments.only or name in arguments.only]:
        try:
            matches.append(match(name, path, arguments.work, arguments.io))
        except SystemExit as error:  # the library cannot make the checkpoint
            not_made[name] = f"{name}: {error}"
    runs, failed = alternate(matches, arguments.runs)
    failed |= not_made
    only = f" --only {shlex.join(arguments.only)}" if arguments.only else ""
    command = f"python benchmarks/methods.py speed {Path(path).name} --runs {arguments.runs} --io {arguments.io}{only}"
    page = speed_page(path, command, matches, runs, failed, load, arguments.runs)
    write(page, f"methods-{slug(Path(path).name)}", arguments.out)
    names = [[contestant.name in failed for contestant in each.contestants] for each in matches]
    return 1 if any((tp1 or tp2) and not theirs for tp1, tp2, theirs in names) else 0
