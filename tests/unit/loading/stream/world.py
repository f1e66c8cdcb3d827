"""Ranks as threads of one process: real engines, sockets, shared memory and files, under a plan made up at random."""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faulty import Counting
from plans import Tiles
from torch import Tensor

from distquant.checkpoint import TensorInfo
from distquant.loading.shard_buffer import ShardBuffer
from distquant.loading.stream.engine import Engine
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.tasks import Task
from distquant.planning.load_plan import TensorPlan
from distquant.planning.read_assignment import ReadAssigner, node_ranks
from distquant.planning.row_map import RowMap, column_segments, row_segments, rows_and_width
from distquant.planning.transfers import Transfer, TransferKind
from distquant.sharding.layout import Component
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition
from distquant.sharding.row_layout import RowLayout, column_step, row_layout_of, row_step

HANGS = 300.0
"""Seconds after which a world that has not ended hangs."""

Hook = Callable[[int, str, str], None]
"""Called with rank, place (`started`, `read`, `encode`, `finish`, `progress`) and tensor; may sleep or raise."""


class Meeting:
    """Collects values of ranks that are threads."""

    def __init__(self, count: int):
        self._barrier, self._values = threading.Barrier(count, timeout=HANGS), [None] * count

    def collect(self, position: int, value: Any) -> list[Any]:
        self._values[position] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def abort(self) -> None:
        self._barrier.abort()


class ThreadComm:
    """As much of `Comm` as the engine uses."""

    def __init__(self, rank: int, meeting: Meeting, timeout: float):
        self.rank, self.timeout, self._meeting = rank, timeout, meeting

    def collect(self, value: Any) -> list[Any]:
        return self._meeting.collect(self.rank, value)


class WatchedSink:
    """Counts how often each row of each component was given memory or placed."""

    def __init__(self, sink: ShardBuffer, rows: int):
        self.sink, self.memory = sink, sink.memory
        self.counts = {name: np.zeros(rows, int) for name in sink.memory}

    def direct(self, row_layout: RowLayout, start: int, stop: int) -> Tensor | None:
        found = self.sink.direct(row_layout, start, stop)
        if found is not None:
            self.counts[row_layout.name][start:stop] += 1
        return found

    def holds(self, row_layout: RowLayout, start: int, stop: int) -> bool:
        return self.sink.holds(row_layout, start, stop)

    def place(self, row_layout: RowLayout, values: Tensor, start: int, stop: int) -> int:
        self.counts[row_layout.name][start:stop] += 1
        return self.sink.place(row_layout, values, start, stop)


@dataclass
class Outcome:
    """The result of one rank."""

    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    error: BaseException | None = None
    read: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class World:
    """A plan, its files, and the conditions under which ranks run."""

    mesh: Mesh
    nodes: tuple[int, ...]
    tensors: list[TensorPlan]
    values: dict[str, Tensor]
    partitions: dict[str, Partition]
    scheme: Tiles
    folder: Path
    infos: dict[str, TensorInfo]
    staging: int
    seed: int = 0
    delay: float = 0.0
    short: bool = False
    mode: str = "buffered"
    timeout: float = 30.0
    hook: Hook = lambda rank, place, tensor: None
    counters: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Makes all that ranks share while they run."""
        self.outcomes = [Outcome() for _ in range(self.mesh.size)]
        sizes = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        self.counters = {node: {n: np.zeros(s, int) for n, s in sizes.items()} for node in set(self.nodes)}
        self.meeting = Meeting(self.mesh.size)
        self.axes = {self.mesh.peers(rank, "tp"): Meeting(self.mesh.tp) for rank in range(self.mesh.size)}

    def run(self) -> list[Outcome]:
        """Runs all ranks to their end; fails with every thread's stack if one has none."""
        self.prepare()
        threads = [threading.Thread(target=self._rank, args=(r,), daemon=True) for r in range(self.mesh.size)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + HANGS
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.01))
        if any(thread.is_alive() for thread in threads):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            raise AssertionError(f"ranks {[r for r, t in enumerate(threads) if t.is_alive()]} hang")
        return self.outcomes

    def _rank(self, rank: int) -> None:
        outcome = self.outcomes[rank]
        try:
            self.load(rank, outcome)
        except BaseException as error:
            outcome.error = without_frames(error)
            for meeting in (self.meeting, *self.axes.values()):
                meeting.abort()

    def load(self, rank: int, outcome: Outcome) -> None:
        """All of one rank's work."""
        peers, hook = self.mesh.peers(rank, "tp"), self.hook
        partial = any(self.nodes[other] != self.nodes[rank] for other in peers)
        counters, chance = self.counters[self.nodes[rank]], self.seed * 100 + rank
        files = Counting(
            self.folder, counters, chance, self.delay, self.short, lambda: hook(rank, "read", ""), self.mode
        )

        def finish(task: Task, filled: Any) -> None:
            hook(rank, "finish", task.name)
            self._check_counts(task, filled, rank)
            if partial:
                self._join(task, filled, peers, rank)
            outcome.order.append(task.index)
            outcome.memory[task.name] = filled.memory

        def sink(task: Task) -> WatchedSink:
            return self._sink(task, rank, partial)

        def progress(done: int, total: int) -> None:
            assert 0 < done <= total
            hook(rank, "progress", "")

        load_state, tasks = LoadState(self.timeout), self.tasks(rank)
        try:
            stages = StageTimer()
            with Engine(
                rank, tasks, files, self.staging, load_state, stages, sink, finish, progress, joined=partial
            ) as engine:
                if self.mesh.size > 1:
                    comm = ThreadComm(rank, self.meeting, self.timeout)
                    engine.peers.connect(comm, node_ranks(self.nodes, rank))
                engine.start()
                hook(rank, "started", "")  # where a loader makes its modules, while threads read
                engine.run()
                outcome.sent, outcome.received = engine.traffic.sent, engine.traffic.received
        finally:
            outcome.read = files.stats.bytes
            files.close()

    def tasks(self, rank: int) -> list[Task]:
        """The tasks of a rank's node."""
        assigner = ReadAssigner(self.mesh, node_ranks(self.nodes, rank))
        return [self._task(index, tensor, assigner, rank) for index, tensor in enumerate(self.tensors)]

    def _task(self, index: int, tensor: TensorPlan, assigner: ReadAssigner, rank: int) -> Task:
        shape, partition = tensor.shape, self.partitions.get(tensor.partition or "")
        quantized, (rows, width) = tensor.scheme != "none", rows_and_width(tensor.shape)
        scheme = self.scheme if quantized else Tiles((Component(name="", dtype=tensor.dtype),))
        row_map = RowMap(shape[::-1] if tensor.transposed else shape, tensor.sources, self.infos)
        kind = TransferKind(
            component=None,
            shape=shape,
            dtype=tensor.dtype,
            shard_dim=tensor.shard_dim,
            partition=partition,
            components=scheme.components,
            replicated=scheme.whole,
            row_step=row_step(scheme.components, (rows, width)),
            column_step=None if tensor.transposed else column_step(scheme.components, (rows, width)),
            single_reader=tensor.transposed,
            row_bytes=self._row_bytes(tensor),
        )
        columns, reads = assigner.assign_reads(kind)
        stored = (rows, columns[1] - columns[0])
        row_layouts = tuple(row_layout_of(c, stored, c.name in scheme.whole) for c in scheme.components)

        def encode(values: Tensor, out: dict[str, Tensor]) -> None:
            self.hook(rank, "encode", tensor.name)
            scheme.encode(values, out)

        return Task(
            index,
            Transfer(tensor, tensor, 0, None, tensor.sources, True, kind),
            row_map,
            (0, row_map.width) if tensor.transposed else columns,
            reads,
            row_layouts,
            getattr(torch, tensor.dtype),
            encode if quantized else None,
        )

    def _row_bytes(self, tensor: TensorPlan) -> tuple[tuple[int, int], ...]:
        """Bytes of each row, worked out from the sources in their order, which is that of the rows."""
        rows, width = rows_and_width(tensor.shape)
        counts = []
        for source in tensor.sources:
            info = self.infos[source.tensor]
            count, item = int(np.prod(info.shape)), info.nbytes // int(np.prod(info.shape))
            if source.take is not None:
                count = count // info.shape[0] * (source.take[2] - source.take[1])
            counts.append((count, item))
        if tensor.transposed:
            return ((rows, sum(count * item for count, item in counts) // rows),)
        return tuple((count // width, width * item) for count, item in counts)

    def _sink(self, task: Task, rank: int, partial: bool) -> WatchedSink:
        tensor, tp = self.tensors[task.index], self.mesh.coordinates(rank)["tp"]
        partition, (rows, width) = self.partitions.get(tensor.partition or ""), rows_and_width(tensor.shape)
        places = (f(tensor.shape, tensor.shard_dim, partition, tp) for f in (row_segments, column_segments))
        columns = (0, width) if task.transposed else task.columns
        return WatchedSink(ShardBuffer(task.row_layouts, columns, width, *places, torch.device("cpu"), partial), rows)

    def _join(self, task: Task, filled: WatchedSink, peers: tuple[int, ...], rank: int) -> None:
        for row_layout in task.row_layouts:
            if row_layout.replicated:
                everyone = self.axes[peers].collect(peers.index(rank), filled.memory[row_layout.name].clone())
                for theirs in everyone:
                    filled.memory[row_layout.name].copy_(filled.memory[row_layout.name].maximum(theirs))

    def _check_counts(self, task: Task, filled: WatchedSink, rank: int) -> None:
        """Each row that comes to a rank has come once; a row of which it keeps nothing, not at all."""
        mine, node = np.zeros(task.row_layouts[0].rows, int), np.zeros(task.row_layouts[0].rows, int)
        for read in task.reads:
            node[slice(*read.rows)] = 1
            if rank in read.owners:
                mine[slice(*read.rows)] = 1
        for row_layout in task.row_layouts:
            expected = node if row_layout.replicated else mine
            found = filled.counts[row_layout.name]
            assert (found[expected == 1] == 1).all(), (
                f"rows of {task.name} {row_layout.name!r} came {found.tolist()} times"
            )
            assert found.max(initial=0) <= 1


# -- what must not be left behind --------------------------------------------------------------------------------------


def there_is() -> Counter[str]:
    """Threads of the engine, open files, and mappings of staging memory."""
    gc.collect()
    found = Counter(thread.name for thread in threading.enumerate() if thread.name.startswith("distquant"))
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found[f"fd {number}: {os.readlink(f'/proc/self/fd/{number}')}"] += 1
    with open("/proc/self/maps") as maps:
        found["staging"] = sum("distquant-staging" in line for line in maps)
    return found


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """What is there afterwards was there before."""
    before = there_is()
    yield
    assert not there_is() - before


def without_frames(error: BaseException) -> BaseException:
    """An error that keeps nothing of what was there when it was raised."""
    linked: BaseException | None = error
    while linked is not None:
        linked.__traceback__ = None
        linked = linked.__cause__ or linked.__context__
    return error


def sometimes(chance: random.Random, seconds: float) -> None:
    """Sleeps now and then."""
    if chance.random() < 0.3:
        time.sleep(chance.random() * seconds)
