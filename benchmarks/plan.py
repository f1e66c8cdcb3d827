"""Times planning from headers alone, in fresh processes, and writes a table.

    python benchmarks/plan.py FOLDER:MESH [FOLDER:MESH ...] [--runs 5] [--quant NAME] [--out FILE]

FOLDER is a checkpoint (only its config and headers are read, so sparse files do), MESH a mesh such as `dp=4,tp=64`. A
checkpoint of a method without a scheme in distquant is planned with `on_unsupported="skip"`.

It times the call of `distquant.plan`, and with the finished plan `to_json`, `from_json` and `digest`. A process
measures one plan. Before the clock starts it has imported distquant, torch and transformers, and has planned the small
example model, because transformers imports most of itself when it first builds a model. "First call" is the same in a
process that has only done the imports. `build` is the part of the plan in which transformers builds the model on
`meta`, and `open` the part in which headers and index are read, each measured by a separate call. Cases take turns, so
that a slow minute of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import SMALL, fresh, machine, memory, table, write

PACKAGES = ("distquant", "torch", "transformers")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    folder: str
    mesh: str
    quant: str | None

    @property
    def name(self) -> str:
        return f"{Path(self.folder).name} {self.mesh}" + (f" {self.quant}" if self.quant else "")


@dataclass(frozen=True)
class Measured:
    """One process's figures: wall and CPU seconds of each step, peak bytes of memory, sizes of the plan."""

    wall: dict[str, float]
    cpu: dict[str, float]
    peak: int
    json_bytes: int
    tensors: int
    digest: str


# -- in the measured processes -----------------------------------------------------------------------------------------


def measure(case: Case, warm: bool) -> Measured:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: F401

    import distquant
    import distquant.api
    from distquant.checkpoint import open_checkpoint
    from distquant.model import build
    from distquant.planning import LoadPlan

    torch.set_num_threads(1)
    if warm:
        distquant.plan(SMALL, mesh="tp=2")
    wall: dict[str, float] = {}
    spent: dict[str, float] = {}

    def timed(step: str, function: Callable[[], Any]) -> Any:
        start, used = time.perf_counter(), time.process_time()
        result = function()
        wall[step], spent[step] = time.perf_counter() - start, time.process_time() - used
        return result

    options = {"quantization_config": case.quant, "mesh": case.mesh, "on_unsupported": "skip"}
    plan = timed("plan", lambda: distquant.plan(case.folder, **options))
    text = timed("to_json", plan.to_json)
    again = timed("from_json", lambda: LoadPlan.from_json(text))
    timed("digest", lambda: again.digest)
    peak = memory("VmHWM")
    timed("build", lambda: build(Path(case.folder), None))
    timed("open", lambda: open_checkpoint(case.folder))
    assert again == plan and again.digest == plan.digest, "the plan read from JSON differs"
    return Measured(wall, spent, peak, len(text), len(plan.tensors), plan.digest)


# -- in the main process -------------------------------------------------------------------------------


def row(case: Case, warm: list[Measured], first: list[Measured]) -> list[str]:
    def median(step: str, runs: list[Measured] = warm) -> str:
        return f"{statistics.median(run.wall[step] for run in runs):.3f}"

    walls = [run.wall["plan"] for run in warm]
    return [
        case.name,
        f"{warm[0].tensors:,}",
        median("plan"),
        f"{min(walls):.3f} - {max(walls):.3f}",
        f"{statistics.median(run.cpu['plan'] for run in warm):.3f}",
        median("plan", first),
        median("build"),
        median("open"),
        median("to_json"),
        median("from_json"),
        median("digest"),
        f"{warm[0].json_bytes / 1e6:.2f}",
        f"{max(run.peak for run in (*warm, *first)) / 1e6:.0f}",
    ]


def page(command: str, runs: int, rows: list[list[str]], load: float) -> str:
    heads = ["what", "entries", "plan s", "range s", "CPU s", "first call s", "of it: build s", "open s"]
    heads += ["to JSON s", "from JSON s", "digest s", "JSON MB", "peak MB"]
    parts = [
        f"# Planning, {datetime.date.today().isoformat()}",
        machine(load, PACKAGES),
        f"Command: `{command}`; {runs} of each, in turns.",
        table(heads, rows),
        "Wall seconds are medians over fresh processes. Plan s: the call of `distquant.plan` once transformers has\n"
        "been imported and has built a small model; first call s: the same in a process that has only imported it.\n"
        "Entries: parameters and buffers in the plan. Peak MB: most resident memory of any of the processes, imports\n"
        "included, after the plan was made, written, read and digested.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Times planning.")
    parser.add_argument("cases", nargs="+", metavar="FOLDER:MESH", help="a checkpoint folder and a mesh, as in a:tp=8")
    parser.add_argument("--runs", type=int, default=5, help="measurements of each case")
    parser.add_argument("--quant", metavar="NAME", help="quantization of all cases; default: the checkpoint's own")
    parser.add_argument("--out", help="file to write; default: benchmarks/results/plan_HARDWARE_DATE.md")
    arguments = parser.parse_args()
    if arguments.runs < 1:
        parser.error("--runs must be 1 or more")
    cases = []
    for text in arguments.cases:
        folder, _, mesh = text.rpartition(":")
        if not os.path.isfile(os.path.join(folder, "config.json")):
            parser.error(f"{text!r} is not FOLDER:MESH with a config.json in the folder")
        cases.append(Case(os.path.abspath(folder), mesh, arguments.quant))
    load = os.getloadavg()[0]
    warm: dict[Case, list[Measured]] = {case: [] for case in cases}
    first: dict[Case, list[Measured]] = {case: [] for case in cases}
    for number in range(arguments.runs):
        for case in cases:
            first[case].append(fresh(measure, case, False))
            warm[case].append(fresh(measure, case, True))
            figures = warm[case][-1]
            seconds = f"{figures.wall['plan']:8.3f} s ({figures.cpu['plan']:.3f} s CPU)"
            print(f"run {number + 1}/{arguments.runs}  {case.name:40} {seconds}", flush=True)
    named = " ".join(f"{Path(case.folder).name}:{case.mesh}" for case in cases)
    options = f" --runs {arguments.runs}" + (f" --quant {arguments.quant}" if arguments.quant else "")
    rows = [row(case, warm[case], first[case]) for case in cases]
    write(page(f"python benchmarks/plan.py {named}{options}", arguments.runs, rows, load), "plan", arguments.out)


if __name__ == "__main__":
    main()
