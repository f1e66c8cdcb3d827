"""Writes the stages of all ranks as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import os

from distquant.errors import InputError, Problem
from distquant.loading.stream.stage_timer import STAGES, StageTimer
from distquant.outputs import write_output
from distquant.parallel.comm import Comm

MICROSECONDS = 1e6


def write_trace(path: str | os.PathLike[str], comm: Comm, timer: StageTimer, origin: float) -> None:
    """Collects the events of all ranks; rank 0 writes them. Every rank must call it; all fail together.

    Args:
        path: file to write, on rank 0.
        comm: the ranks.
        timer: of this rank.
        origin: `time.perf_counter` when this rank left the common start; clocks of machines differ.

    Raises:
        InputError: the file cannot be written.
    """
    mine = [(e.stage, e.start - origin, e.stop - e.start, e.tensor, e.nbytes) for e in timer.events]
    everyone = comm.collect(mine)
    problems: tuple[Problem, ...] = ()
    if comm.rank == 0:
        try:
            write_output("trace", path, json.dumps({"traceEvents": _events(everyone), "displayTimeUnit": "ms"}))
        except InputError as error:
            problems = error.problems
    if problems := comm.collect(problems)[0]:
        raise InputError(problems)


def _events(everyone: list[list[tuple[str, float, float, str, int]]]) -> list[dict[str, object]]:
    """Returns the trace's events: names of ranks and stages, and each stage's times."""
    events: list[dict[str, object]] = []
    for rank, theirs in enumerate(everyone):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        for number, stage in enumerate(STAGES):
            events.append({"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": stage}})
        for stage, start, seconds, tensor, nbytes in theirs:
            events.append(
                {
                    "ph": "X",
                    "pid": rank,
                    "tid": STAGES.index(stage),
                    "name": tensor or stage,
                    "cat": stage,
                    "ts": start * MICROSECONDS,
                    "dur": seconds * MICROSECONDS,
                    "args": {"bytes": nbytes},
                }
            )
    return events
