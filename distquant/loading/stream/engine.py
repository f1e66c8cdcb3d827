"""One rank's share of a load: reads ahead, quantizes, sends pieces to the ranks of its node, and places what it keeps.

    reader threads:   files -> slots                                                                (reader.py)
    main thread:      slot -> device -> components -> final memory, and slots for other ranks       (emitter.py)
    listening thread: other ranks' slots -> final memory                                            (receiver.py)

Where weights go to a device, what comes from other ranks is gathered on the host first, and goes there once a tensor
(gathering.py).

Every piece is a run of complete rows that one rank of the node has read. That rank quantizes it, straight into its
final place if it has one there, otherwise into a slot that the other ranks copy their parts from. Tensors are finished
in one order, the same on every rank, as soon as all their rows have arrived. A rank may run ahead of that only while
the statistics of its unfinished tensors fit the budget.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from time import monotonic, perf_counter

import torch

from distquant import activity
from distquant.environment import cpu_limit
from distquant.loading.stream.arrivals import ArrivalTracker
from distquant.loading.stream.budget import Budget
from distquant.loading.stream.copier import Copier
from distquant.loading.stream.emitter import Emitter
from distquant.loading.stream.files import Files
from distquant.loading.stream.gathering import GatheringMemory
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.peers import Peers
from distquant.loading.stream.reader import Reader
from distquant.loading.stream.receiver import Receiver, TrafficStats
from distquant.loading.stream.sender import Sender
from distquant.loading.stream.sinks import Sinks
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.staging_buffer import Slots, StagingBuffer
from distquant.loading.stream.tasks import TORCH_DTYPE, Chunk, Sink, Task, batches, chunks_of
from distquant.planning.slots import READ_SLOTS, SEND_SLOTS
from distquant.units import format_bytes

READERS = 2
"""Reads in flight, where they may wait for a disk or a network."""

DEVICE_READERS = READ_SLOTS
"""Reads in flight where everything is quantized on devices, so that no reader takes a core from that."""

USERS = 4
"""Users of the load buffer and of gathered memory that end before these: peers, reader, copier, and gathering."""

HANGING = 2.0
"""Seconds that a load which has failed waits for reads that have begun."""


def cores_of_a_rank(ranks: int) -> int:
    """Returns the cores that each of a node's ranks has: those that it is bound to, else its share of the machine's.

    They are no more than its share of a cgroup's CPU limit, which holds for all ranks of a container together.
    """
    cores = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    own = bound if bound < cores else cores // ranks
    limit = cpu_limit()
    return own if limit is None else min(own, int(limit) // ranks)


class Engine:
    """Streams tasks: `start`, then `run`. A context manager; leaving it ends all threads and gives back all memory.

    Args:
        rank: this rank.
        tasks: of its node, the same on each of the node's ranks.
        files: to read from.
        staging: bytes that weights may pass through.
        load_state: of the load.
        timer: of the stages.
        sink: makes the memory that a task ends in.
        finish: called with a task and its sink when all its rows are there; in the same order on every rank.
        progress: called with the bytes that are done, and all of them.
        joined: True if `finish` waits for ranks of other nodes.
    """

    def __init__(
        self,
        rank: int,
        tasks: Sequence[Task],
        files: Files,
        staging: int,
        load_state: LoadState,
        timer: StageTimer,
        sink: Callable[[Task], Sink],
        finish: Callable[[Task, Sink], None],
        progress: Callable[[int, int], None] | None = None,
        joined: bool = False,
    ):
        self.rank, self.tasks, self.files, self.load_state, self.timer = rank, tasks, files, load_state, timer
        self._finish, self._progress, self._joined = finish, progress, joined
        self.budget = budget = Budget.of(staging, tasks)
        self.staging_buffer = staging_buffer = StagingBuffer(READ_SLOTS + SEND_SLOTS, budget.slot)
        self._devices = {task.device: None for task in tasks if task.device.type != "cpu"}
        """Devices that weights go to, in their order of use."""
        self.not_pinned = staging_buffer.pin(next(iter(self._devices))) if self._devices else ""
        """Why the buffer is not pinned for copies to devices; "" = it is, or there are none."""
        pinned = bool(self._devices) and not self.not_pinned
        self._reads = reads = Slots(range(READ_SLOTS), load_state.watch)
        sends = Slots(range(READ_SLOTS, READ_SLOTS + SEND_SLOTS), load_state.watch)
        self.arrivals = arrivals = ArrivalTracker(tasks, rank, load_state)
        self.peers = Peers(rank, staging_buffer, load_state)
        self.copier = copier = Copier(pinned, rank, load_state)
        self.gathering = GatheringMemory()
        """Host memory for what goes to a device once a tensor."""
        self._sinks = sinks = Sinks(sink)
        self._sender = sender = Sender(copier, staging_buffer, sends, self.peers, load_state, self.peers.no_slot)
        self._receiver = Receiver(tasks=tasks, reads=reads, sends=sends, arrivals=arrivals, sinks=sinks, timer=timer)
        self._emitter = Emitter(
            rank=rank, others=self.peers.peers, budget=budget, staging_buffer=staging_buffer, reads=reads,
            sender=sender, copier=copier, arrivals=arrivals, sinks=sinks, timer=timer,
        )  # fmt: skip
        self._reader: Reader | None = None

    @property
    def traffic(self) -> TrafficStats:
        """Bytes sent and received so far."""
        return self._receiver.traffic

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.load_state.stop()
        begun = monotonic()
        until = begun + self.load_state.timeout
        reader, self._reader = self._reader, None
        ended: list[bool] = []
        # Each of these runs whatever the others raise, from the last to the first: a device that has failed raises at
        # every question, and what it raises must not leave a thread, a socket or the memory behind.
        with ExitStack() as closing:
            if error is not None:  # the load has failed: what closing raises then is a consequence
                closing.enter_context(suppress(RuntimeError, OSError))
            closing.callback(self._give_back, ended)
            closing.callback(self._emitter.clear)
            closing.callback(self._sinks.clear)
            closing.callback(lambda: ended.append(self.gathering.close(until)))
            closing.callback(lambda: ended.append(self.copier.close(until)))
            closing.callback(
                lambda: ended.append(reader is None or reader.join(begun + HANGING if error else until)),
            )
            # Others first: they wait for this rank, and a read that hangs may never come back.
            closing.callback(lambda: ended.append(self.peers.close(error, until)))

    def _give_back(self, ended: list[bool]) -> None:
        """Gives back the load buffer if its users have ended: peers, reads and copies. One that raised may not have."""
        if len(ended) == USERS and all(ended):
            self.staging_buffer.close()
            return
        # A read or device still uses this memory: unmapped, it would fault; reused, it would give wrong weights.
        self.staging_buffer.keep()
        size = format_bytes(self.staging_buffer.slot_bytes * self.staging_buffer.slots)
        cause = f"rank {self.rank}: a read or copy still goes on {self.load_state.timeout:g} s after the load ended"
        warnings.warn(f"{cause}; {size} of the load buffer stay in use", RuntimeWarning, stacklevel=3)

    def start(self) -> None:
        """Begins to listen and, where threads read ahead, to read; `run` goes on."""
        if self.peers.peers:
            self._receiver.streams = [torch.accelerator.current_stream(device) for device in self._devices]
        self.peers.start(self._receiver)
        chunks, threads = batches(self._chunks(), self.budget.largest), self._readers()
        self._reader = Reader(
            self.files, self.staging_buffer, self._reads, self.load_state, self.timer, chunks, threads,
            self.peers.no_slot,
        )  # fmt: skip

    def run(self) -> None:
        """Loads everything that this rank keeps; returns when it is finished."""
        assert self._reader is not None
        total = self.bytes_to_read()
        done = 0
        for batch in self._reader:
            for chunk in batch:
                done += chunk.nbytes
                activity.enter(f"loading {chunk.task.name}")
                self._hold_back(chunk.task)
                self._emitter.consume(chunk)
                chunk.raw = chunk.into = None  # a chunk must not keep its slot or final memory alive
                self._finish_arrived()
                if self._progress is not None:
                    self._progress(done, total)
            self._emitter.end_batch(idle=not self._reader.ready)
        # All own pieces are out. What is missing now can only come from others, who may wait for these messages.
        self._sender.flush()
        while not self.arrivals.ended:
            self.arrivals.await_next()
            self._finish_arrived()
        self.copier.drain()
        self.peers.leave()

    def _readers(self) -> int:
        """Returns how many threads read ahead. Reads from memory take a core, and quantizing needs the others."""
        on_devices = all(task.device.type != "cpu" for task in self.tasks)
        most = DEVICE_READERS if on_devices else READERS
        if not all(map(self.files.in_memory, self._files())):
            return most
        if cores_of_a_rank(len(self.peers.peers) + 1) < 2:
            return 0  # a thread would only take turns with the main thread on the same core
        return most if on_devices or all(task.encode is None for task in self.tasks) else 1

    def _files(self) -> set[str]:
        """Returns the files that this rank reads from."""
        mine = (task for task in self.tasks if any(read.reader == self.rank for read in task.reads))
        return {file for task in mine for file in task.rows.files}

    def bytes_to_read(self) -> int:
        """Returns the bytes of all rows that this rank reads."""
        return sum(read.nbytes for task in self.tasks for read in task.reads if read.reader == self.rank)

    def _chunks(self) -> Iterator[Chunk]:
        """Yields all pieces that this rank reads, in order; runs on a reader thread."""
        for task in self.tasks:
            for chunk in chunks_of(task, self.rank, self.budget.piece):
                self._choose_target(chunk)
                yield chunk

    def _choose_target(self, chunk: Chunk) -> None:
        """Decides how a piece is read: past the page cache or through it, and into its final place or a slot.

        Rows that need no conversion and that only this rank keeps are read directly into place.
        """
        task = chunk.task
        chunk.direct = chunk.span is not None and self.files.is_direct(chunk.span[0])
        # Reads past the page cache start and end on pages, so they fill more than the rows' own memory.
        if task.encode is not None or task.transposed or chunk.direct or task.device.type != "cpu":
            return
        if self._emitter.receivers(chunk) or TORCH_DTYPE[chunk.ranges[0].dtype] != task.dtype:
            return
        if any(self.files.is_direct(piece.file) for piece in chunk.ranges):
            return
        sink, row_layout = self._sinks.of(task), task.row_layouts[0]
        if sink.holds(row_layout, chunk.start, chunk.stop):
            # As a call: the thread that reads makes the memory, and not while others wait for their next batch.
            chunk.into = lambda: sink.direct(row_layout, chunk.start, chunk.stop).view(torch.uint8)  # type: ignore[union-attr]

    def _hold_back(self, task: Task) -> None:
        """Waits until the statistics of tensors in progress, this one included, fit the budget."""
        arrivals = self.arrivals
        while arrivals.next < task.index and arrivals.unfinished_bytes(task) > self.budget.statistics:
            start = perf_counter()
            # Ranks may all hold back at the same tensor: the pieces that finish it must be out before any waits.
            self._sender.flush()
            arrivals.await_next()
            self.timer.add("exchange", start)
            self._finish_arrived()

    def _finish_arrived(self) -> None:
        """Finishes the tensors that are complete, in order."""
        while self.arrivals.next_is_complete():
            task = self.tasks[self.arrivals.next]
            if not task.is_for(self.rank):
                self.arrivals.finished()
                continue
            sink = self._sinks.of(task)
            start = perf_counter()
            if self._joined:
                # `finish` may wait for other nodes, whose ranks wait in turn for messages that are kept back here.
                self._sender.flush()
            self._finish(task, sink)
            self.timer.add("quantize" if task.encode is not None else "place", start, task.name)
            self._sinks.drop(task)
            self.arrivals.finished()
