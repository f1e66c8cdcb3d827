"""Times loads by distquant, by its alternatives, and by the minimum for any loader ("floor"), in alternation.

    python benchmarks/load.py CHECKPOINT [--runs 5] [--only nf4 ...] [--out FILE]

CHECKPOINT is a folder of a bf16 model with safetensors files. A benchmark of CPUs: GPUs are hidden.

A time is that from the call of the load to the assembled model (bf16: every byte of its parameters read once). Each
measurement has fresh processes. Before the clock starts:

- they have imported everything, joined their process group and loaded the small example model by the same call;
- the checkpoint's files have just been read, so they are in the page cache if it has room (for a cold contestant they
  have just been dropped from it);
- memory of 1.25 times the checkpoint's size has just been allocated and freed, so that a virtual machine does not wait
  for its host to provide it.

The seconds of a run are those of its slowest rank. Contestants take turns (A B C A B C ...), so that a slow minute of
the machine affects all of them.

Writes a page and, beside it under the same name, all measurements as JSON (for `plot.py peers`).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import describe, shards, total_bytes
from common import ROOT, cpu, machine, slug, table, write
from contestants import BARS, CONTESTANTS, MEMORY_BAR, Bar, Contestant, Measured
from ranks import one_run

PACKAGES = ("distquant", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors")
OURS = ("distquant", "recorded")
"""Systems that are loads by distquant."""

Runs = dict[str, list[list[Measured]]]
"""Figures of every rank of every run, by the contestant's name."""


def seconds_of(runs: list[list[Measured]]) -> list[float]:
    """Returns the seconds of the slowest rank of each run."""
    return [max(rank.seconds for rank in ranks) for ranks in runs]


def chosen(runs: Runs, contestants: Sequence[Contestant] = CONTESTANTS) -> list[Contestant]:
    return [contestant for contestant in contestants if runs.get(contestant.name)]


def gigabytes(runs: list[list[Measured]], figure: str) -> str:
    """Formats a figure of all ranks together, the median of the runs; empty if it is unknown."""
    sums = [sum(getattr(rank, figure) for rank in ranks) for ranks in runs if getattr(ranks[0], figure) is not None]
    return f"{statistics.median(sums) / 1e9:.3f}" if sums else ""


def times(runs: Runs, size: int) -> str:
    rows = []
    for contestant in chosen(runs):
        measured = runs[contestant.name]
        seconds = seconds_of(measured)
        median = statistics.median(seconds)
        rows.append(
            [
                contestant.name,
                f"{contestant.ranks} x {contestant.threads}",
                f"{median:.3f}",
                f"{min(seconds):.3f} - {max(seconds):.3f}",
                f"{size / median / 1e9:.2f}",
                gigabytes(measured, "memory"),
                gigabytes(measured, "own"),
                gigabytes(measured, "read"),
                gigabytes(measured, "direct"),
            ]
        )
    heads = ["what", "processes x threads", "median s", "range s", "GB/s", "peak memory GB"]
    heads += ["own memory GB", "read GB", "direct GB"]
    return table(heads, rows)


def verdict(met: bool) -> str:
    return "met" if met else "NOT met"


def compared(bar: Bar, ratio: float) -> list[str]:
    """Returns the cells of a bar: the bar itself, the ratio of times, and the verdict."""
    if bar.faster is not None:
        return [f"{bar.faster:g}x faster or more", verdict(1 / ratio >= bar.faster)]
    if bar.most is not None:
        return [f"{bar.most:g} times or less", verdict(ratio <= bar.most)]
    return ["", ""]


def ratios(runs: Runs) -> str | None:
    rows = []
    for bar in BARS:
        if runs.get(bar.a) and runs.get(bar.b):
            a, b = (statistics.median(seconds_of(runs[name])) for name in (bar.a, bar.b))
            rows.append([bar.a, bar.b, f"{a / b:.2f}", f"{b / a:.2f}", *compared(bar, a / b)])
    heads = ["A", "B", "time of A / time of B", "A is faster by", "bar for A", ""]
    return table(heads, rows) if rows else None


def floors(runs: Runs) -> str | None:
    """Formats the parts of the floors."""
    rows = []
    for contestant in chosen(runs):
        if contestant.system == "floor":
            slowest = [max(ranks, key=lambda rank: rank.seconds) for ranks in runs[contestant.name]]
            parts = {name: statistics.median(rank.parts[name] for rank in slowest) for name in slowest[0].parts}
            rows.append([contestant.name, *(f"{seconds:.3f}" for seconds in parts.values())])
    heads = ["floor", "preadv s", "quantize s", "first write to fresh memory s"]
    return table(heads, rows) if rows else None


def memory(runs: Runs, contestants: Sequence[Contestant] = CONTESTANTS) -> str | None:
    """Returns the rank with most resident memory beyond its shard, in any run."""
    rows = []
    for contestant in chosen(runs, contestants):
        if contestant.system not in OURS or contestant.cold or contestant.once:
            continue
        ranks = [rank for each in runs[contestant.name] for rank in each]
        worst = max(ranks, key=lambda rank: rank.memory - (rank.finished or 0))
        assert worst.finished is not None and worst.staging is not None
        beyond, bar = worst.memory - worst.finished, worst.staging + MEMORY_BAR
        figures = (worst.memory, worst.finished, beyond, worst.staging, bar)
        rows.append([contestant.name, *(f"{nbytes / 2**20:.1f}" for nbytes in figures), verdict(beyond <= bar)])
    heads = ["memory of the worst rank, MiB", "peak over before", "finished shard", "beyond it", "staging"]
    return table([*heads, "bar: staging + 100", ""], rows) if rows else None


def bytes_read(runs: Runs, contestants: Sequence[Contestant] = CONTESTANTS) -> str | None:
    rows = []
    for contestant in chosen(runs, contestants):
        if contestant.system not in OURS or contestant.ranks == 1 or contestant.staging or contestant.cold:
            continue
        for ranks in runs[contestant.name][:1]:
            read, needed = sum(rank.read or 0 for rank in ranks), ranks[0].needed or 1
            met = verdict(round(read / needed, 2) <= 1)
            rows.append([contestant.name, f"{read:,}", f"{needed:,}", f"{read / needed:.4f}", "1.00", met])
    heads = ["bytes", "read by all ranks", "of the model's tensors", "ratio", "bar", ""]
    return table(heads, rows) if rows else None


def page(path: str, command: str, runs: Runs, load: float, count: int) -> str:
    parts = [
        f"# Loading {Path(path).name}, {datetime.date.today().isoformat()}",
        f"{describe(path)}\n\n{machine(load, PACKAGES)}",
        f"Command: `{command}`; {count} of each, in turns (one where only bytes are counted: tp=4 and dp=2,tp=2).",
        times(runs, total_bytes(path)),
        ratios(runs),
        floors(runs),
        memory(runs),
        bytes_read(runs),
        "Seconds are medians of those of the slowest rank, from the call of the load to the assembled model (bf16:\n"
        "with every byte of its parameters read once); processes started, imports done, process group up, files in\n"
        "the page cache (cold: dropped from it), memory taken and given back just before (a guest's host may have had\n"
        "it). GB/s: bytes of the files by those seconds. Peak memory: resident\n"
        "memory over that before the load, summed over the processes (pages of mapped files count). Own memory: at\n"
        "the end, without mapped files; a peer that has less of it than its model is large still lives in the page\n"
        "cache. Read: what distquant reports or the floor counts; direct: of it, past the page cache. A floor is two\n"
        "processes with a thread each that, one after the other, read half of the files' bytes into a small buffer,\n"
        "quantize half of the quantized parameters from a warm 4 MiB buffer into warm outputs, and write their\n"
        "finished shard's bytes once to fresh memory.",
    ]
    return "\n\n".join(part for part in parts if part is not None) + "\n"


def raw(path: str, command: str, runs: Runs, load: float) -> dict[str, Any]:
    """Returns all measurements, for JSON."""
    results = []
    for contestant in chosen(runs):
        measured = runs[contestant.name]
        ranks = [[dataclasses.asdict(rank) for rank in each] for each in measured]
        median = statistics.median(seconds_of(measured))
        results.append({**dataclasses.asdict(contestant), "seconds": median, "runs": ranks})
    return {
        "model": Path(path).name,
        "what": describe(path),
        "bytes": total_bytes(path),
        "date": datetime.date.today().isoformat(),
        "machine": machine(load, PACKAGES),
        "cpu": f"{cpu()}, {os.cpu_count()} cores",
        "command": command,
        "contestants": results,
        "bars": [dataclasses.asdict(bar) for bar in BARS if runs.get(bar.a) and runs.get(bar.b)],
    }


def measure(path: str, wanted: list[Contestant], count: int) -> Runs:
    runs: Runs = {contestant.name: [] for contestant in wanted}
    for number in range(count):
        for contestant in wanted:
            if contestant.once and number:
                continue
            run = one_run(path, contestant)
            runs[contestant.name].append(run)
            print(f"run {number + 1}/{count}  {contestant.name:50} {seconds_of([run])[0]:8.3f} s", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Times loads by distquant, its peers and their floors.")
    parser.add_argument("checkpoint", help="folder of a bf16 model")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each contestant")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only contestants whose names contain one of these")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/WHAT_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    path = os.path.abspath(arguments.checkpoint)
    if not shards(path) or not os.path.isfile(os.path.join(path, "config.json")):
        parser.error(f"{path} holds no config.json with safetensors files")
    if arguments.runs < 1:
        parser.error("--runs must be 1 or more")
    if arguments.out is not None and not arguments.out.endswith(".md"):
        parser.error(f"--out must end in .md, {arguments.out!r} does not: the measurements go beside it as .json")
    wanted = [c for c in CONTESTANTS if not arguments.only or any(text in c.name for text in arguments.only)]
    if not wanted:
        parser.error(f"--only matches none of: {', '.join(c.name for c in CONTESTANTS)}")
    load = os.getloadavg()[0]
    runs = measure(path, wanted, arguments.runs)
    options = f" --runs {arguments.runs}" + (f" --only {shlex.join(arguments.only)}" if arguments.only else "")
    command = f"python benchmarks/load.py {Path(path).name}{options}"
    subject = f"load-{slug(Path(path).name)}"
    named = f"{subject}_{slug(cpu())}-{os.cpu_count()}c_{datetime.date.today().isoformat()}.md"
    target = Path(arguments.out) if arguments.out else ROOT / "benchmarks" / "results" / named
    write(page(path, command, runs, load, arguments.runs), subject, str(target))
    target.with_suffix(".json").write_text(json.dumps(raw(path, command, runs, load), indent=1) + "\n")


if __name__ == "__main__":
    main()
