"""Writes the stages of all ranks as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import os

from distquant.loading.stream.stage_timer import STAGES, StageTimer
from distquant.parallel.comm import Comm

MICROSECONDS = 1e6


def write_trace(path: str | os.PathLike[str], comm: Comm, timer: StageTimer, origin: float) -> None:
    """Collects the events of all ranks; rank 0 writes them. Every rank must call it.

    Args:
        path: file to write, on rank 0.
        comm: the ranks.
        timer: of this rank.
        origin: `time.perf_counter` when this rank left the common start; clocks of machines differ.
    """
    mine = [(e.stage, e.start - origin, e.stop - e.start, e.tensor, e.nbytes) for e in timer.events]
    everyone = comm.collect(mine)
    if comm.rank != 0:
        return
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
    with open(path, "w") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)
