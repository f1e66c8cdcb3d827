"""One rank's share of a load: reads ahead, quantizes, hands pieces to the ranks of its node, and places what it keeps.

    reader threads: files -> slots        main thread: slot -> device -> components -> final memory, other ranks
    listening thread: other ranks -> final memory

Every piece is a run of whole rows that one rank of the node read. It is quantized where it was read, straight into its
final place if it has one there, otherwise into a slot that the other ranks copy their parts from. Tensors are finished
in one order, the same on every rank, as soon as all their rows have arrived; nobody runs further ahead of that than
the statistics that must be kept meanwhile allow.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter

import torch
from torch import Tensor

from distquant.environment import format_bytes
from distquant.errors import InputError
from distquant.loading.stream.arrivals import ArrivalTracker
from distquant.loading.stream.budget import Budget
from distquant.loading.stream.copier import Copier
from distquant.loading.stream.files import Files
from distquant.loading.stream.peers import DATA, Message, Peer, Peers
from distquant.loading.stream.reader import Reader
from distquant.loading.stream.sender import Sender
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.staging_buffer import LoadState, Slots, StagingBuffer
from distquant.loading.stream.tasks import TORCH_DTYPE, Chunk, Sink, Task, batches, chunks_of
from distquant.planning.slots import READ_SLOTS, SEND_SLOTS

READERS = 2
"""Reads in flight, where they may wait for a disk or a network."""


def cores_of_a_rank(ranks: int) -> int:
    """Cores that each of a node's ranks has: those that it is bound to, else its share of the machine's."""
    there = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    return bound if bound < there else there // ranks


@dataclass
class TrafficStats:
    """Bytes handed to other ranks and taken from them."""

    sent: int = 0
    received: int = 0


class Engine:
    """Streams tasks: `start`, then `run`. A context manager; leaving it ends all threads and gives back all memory.

    Args:
        rank: this rank.
        tasks: of its node, the same on each of the node's ranks.
        files: to read from.
        staging: bytes that weights may pass through.
        board: of the load.
        stages: where the time goes.
        sink: makes the memory that a task ends in.
        finish: called with a task and its sink when all its rows are there; in the same order on every rank.
        progress: called with the bytes that are done, and all of them.
        joined: whether `finish` waits for ranks of other nodes.
    """

    def __init__(
        self,
        rank: int,
        tasks: Sequence[Task],
        files: Files,
        staging: int,
        load_state: LoadState,
        stages: StageTimer,
        sink: Callable[[Task], Sink],
        finish: Callable[[Task, Sink], None],
        progress: Callable[[int, int], None] | None = None,
        joined: bool = False,
    ):
        self.rank, self.tasks, self.files = rank, tasks, files
        self.load_state, self.stages, self.moved = load_state, stages, TrafficStats()
        self._make_sink, self._finish, self._progress, self._joined = sink, finish, progress, joined
        self.budget = Budget.of(staging, tasks)
        self.staging_buffer = StagingBuffer(READ_SLOTS + SEND_SLOTS, self.budget.slot)
        self._devices = {task.device: None for task in tasks if task.device.type != "cpu"}
        """Devices that weights go to, in their order of use."""
        pinned = bool(self._devices) and self.staging_buffer.pin(next(iter(self._devices)))
        self._reads = Slots(range(READ_SLOTS), load_state.watch)
        self._sends = Slots(range(READ_SLOTS, READ_SLOTS + SEND_SLOTS), load_state.watch)
        self.arrivals = ArrivalTracker(tasks, rank, load_state)
        self.peers = Peers(rank, self.staging_buffer, load_state)
        self._sender = Sender(self.staging_buffer, self._sends, self.peers, load_state, self.arrivals.late)
        self.copier = Copier(pinned, rank, load_state)
        self._streams: list[torch.Stream] = []
        """The main thread's current streams."""
        self._sinks: dict[int, Sink] = {}
        self._transposing: dict[int, Tensor] = {}
        self._sink_lock = threading.Lock()
        self._reader: Reader | None = None
        self._lent = False
        """Whether others must still be told of what they copy from slots to read into, of which there are few."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.load_state.stop()
        if self._reader is not None:
            self._reader.join()
        until = monotonic() + self.load_state.timeout
        ended = self.peers.close(error, until)
        ended = self.copier.close(until) and ended
        self._sinks.clear()
        self._transposing.clear()
        self._reader = None
        if ended:
            self.staging_buffer.close()
        else:
            self.staging_buffer.keep()
            size = format_bytes(self.staging_buffer.slot_bytes * self.staging_buffer.slots)
            what = f"rank {self.rank}: a device still copies {self.load_state.timeout:g} s after the load ended"
            warnings.warn(f"{what}; {size} of staging memory stay in use", RuntimeWarning, stacklevel=2)

    # -- the main thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to listen and, where threads read ahead, to read; `run` goes on."""
        if self.peers.peers:
            self._streams = [torch.accelerator.current_stream(device) for device in self._devices]
        self.peers.start(self)
        chunks, threads = batches(self._chunks(), self.budget.largest), self._readers()
        self._reader = Reader(
            self.files, self.staging_buffer, self._reads, self.load_state, self.stages, chunks, threads
        )

    def run(self) -> None:
        """Loads everything that this rank keeps; returns when it is finished."""
        assert self._reader is not None
        total = self.bytes_to_read()
        done = 0
        for batch in self._reader:
            for chunk in batch:
                done += chunk.nbytes
                self._hold_back(chunk.task)
                self._consume(chunk)
                chunk.raw = chunk.into = None
                self._finish_arrived()
                if self._progress is not None:
                    self._progress(done, total)
            if self._lent or not self._reader.ready:
                self._sender.flush()
                self._lent = False
        self._sender.flush()
        while not self.arrivals.ended:
            self.arrivals.await_next()
            self._finish_arrived()
        self.copier.drain()
        self.peers.leave()

    def _readers(self) -> int:
        """Threads that read ahead. Reads from memory are work for a core, and quantizing wants the others."""
        if not all(map(self.files.in_memory, self._files())):
            return READERS
        if cores_of_a_rank(len(self.peers.peers) + 1) < 2:
            return 0
        return READERS if all(task.encode is None for task in self.tasks) else 1

    def _files(self) -> set[str]:
        """Files that this rank reads of."""
        mine = (task for task in self.tasks if any(read.reader == self.rank for read in task.reads))
        return {file for task in mine for file in task.rows.files}

    def bytes_to_read(self) -> int:
        """Bytes of all rows that this rank reads."""
        return sum(read.nbytes for task in self.tasks for read in task.reads if read.reader == self.rank)

    def _chunks(self) -> Iterator[Chunk]:
        """All pieces that this rank reads, in order; runs on a reader thread."""
        for task in self.tasks:
            for chunk in chunks_of(task, self.rank, self.budget.piece):
                self._aim(chunk)
                yield chunk

    def _aim(self, chunk: Chunk) -> None:
        """Says how a piece is read: past the page cache or through it, and straight into its final place or a slot.

        Straight go rows that stay as they are, and that nobody else keeps.
        """
        task = chunk.task
        chunk.direct = chunk.span is not None and self.files.is_direct(chunk.span[0])
        if task.encode is not None or task.transposed or chunk.direct or task.device.type != "cpu":
            return
        if self._receivers(chunk) or TORCH_DTYPE[chunk.ranges[0].dtype] != task.dtype:
            return
        if any(self.files.is_direct(piece.file) for piece in chunk.ranges):
            return
        sink, row_layout = self._sink(task), task.row_layouts[0]
        if sink.holds(row_layout, chunk.start, chunk.stop):
            chunk.into = lambda: sink.direct(row_layout, chunk.start, chunk.stop).view(torch.uint8)  # type: ignore[union-attr]

    def _receivers(self, chunk: Chunk) -> tuple[int, ...]:
        """Other ranks of the node that keep something of these rows."""
        if chunk.task.replicated:
            return tuple(filter(chunk.task.is_for, self.peers.peers))
        return tuple(rank for rank in chunk.read.owners if rank != self.rank)

    def _consume(self, chunk: Chunk) -> None:
        task = chunk.task
        if chunk.into is not None:
            self.arrivals.count(task, chunk.start, chunk.stop)
            return
        assert chunk.raw is not None
        start = perf_counter()
        kind = TORCH_DTYPE[chunk.ranges[0].dtype]
        on_grid = chunk.raw.storage_offset() % kind.itemsize == 0
        raw = chunk.raw if on_grid else chunk.raw.clone()
        rows = raw.view(kind).view(chunk.stop - chunk.start, -1)
        as_it_is = on_grid and task.encode is None and rows.dtype == task.dtype and not task.transposed
        receivers = self._receivers(chunk)
        if as_it_is and (task.device.type == "cpu" or receivers):
            self._pass_on(chunk, rows.view(-1), receivers)
            self._reads.release(chunk.slot)
            return
        moved = self.copier.to_device(rows, task.device, lambda: self._reads.release(chunk.slot))
        moved = moved.to(task.dtype)
        self.stages.add("copy", start, task.name, chunk.nbytes)
        if task.transposed:
            self._transpose(chunk, moved, receivers)
        else:
            self._emit(chunk, moved, chunk.start, chunk.stop, receivers)
        if task.device.type == "cpu":
            self._reads.release(chunk.slot)

    def _pass_on(self, chunk: Chunk, values: Tensor, receivers: tuple[int, ...]) -> None:
        """Rows that stay as they are: the slot that they were read into is what others copy from."""
        task = chunk.task
        if receivers:
            self._lent = True
            self._reads.hold(chunk.slot, len(receivers))
            offset = values.data_ptr() - self.staging_buffer.memory.data_ptr()
            self._tell(receivers, Message(DATA, chunk.slot, task.index, 1, chunk.start, chunk.stop, offset))
        start = perf_counter()
        nbytes = self._sink(task).place(task.row_layouts[0], values, chunk.start, chunk.stop)
        self.stages.add("place", start, task.name, nbytes)
        self.arrivals.count(task, chunk.start, chunk.stop)

    def _transpose(self, chunk: Chunk, rows: Tensor, receivers: tuple[int, ...]) -> None:
        """Gathers a tensor that is stored `[in, out]`; its last row sends it on the right way round."""
        task = chunk.task
        if task.index not in self._transposing:
            shape = (task.rows.rows, task.rows.width)
            self._transposing[task.index] = torch.empty(shape, dtype=task.dtype, device=task.device)
        whole = self._transposing[task.index]
        whole[chunk.start : chunk.stop] = rows
        if chunk.stop < task.rows.rows:
            return
        del self._transposing[task.index]
        most = task.rows_within(self.budget.piece)
        for first in range(0, task.row_layouts[0].rows, most):
            last = min(first + most, task.row_layouts[0].rows)
            self._emit(chunk, whole[:, first:last].t().contiguous(), first, last, receivers)

    def _emit(self, chunk: Chunk, rows: Tensor, start: int, stop: int, receivers: tuple[int, ...]) -> None:
        """Quantizes rows into their final place or a slot, and tells the ranks that keep something of them."""
        task = chunk.task
        if start % task.step or (stop % task.step and stop < task.row_layouts[0].rows):
            what = f"its parts start at row {start}, quantization blocks need multiples of {task.step}"
            raise InputError.one(task.name, what, "Skip the module, or convert the checkpoint first")
        mask = self._wanted(chunk) if receivers else 0
        payload, nbytes = task.payload(start, stop, mask)
        slot, offset, views = -1, 0, {}
        if payload:
            slot, offset = self._room(nbytes, len(receivers))
            memory = self.staging_buffer.memory[offset : offset + nbytes]
            views = {row_layout.name: memory[at : at + size].view(row_layout.dtype) for row_layout, at, size in payload}
        begun = perf_counter()
        sink = self._sink(task)
        places = {row_layout.name: sink.direct(row_layout, start, stop) for row_layout in task.row_layouts}
        out = {
            row_layout.name: self._target(row_layout, places, views, task, start, stop)
            for row_layout in task.row_layouts
        }
        if task.encode is not None:
            task.encode(rows, out)
            begun = self.stages.add("quantize", begun, task.name, rows.nbytes)
        else:
            out[""].copy_(rows.reshape(-1))
        for row_layout in task.row_layouts:
            view = views.get(row_layout.name)
            if view is not None and out[row_layout.name] is not view:
                view.copy_(out[row_layout.name])
            if out[row_layout.name] is not places[row_layout.name]:
                sink.place(row_layout, out[row_layout.name], start, stop)
        self.stages.add("place", begun, task.name, nbytes)
        if payload:
            self._tell(receivers, Message(DATA, slot, task.index, mask, start, stop, offset))
        self.arrivals.count(task, start, stop)

    @staticmethod
    def _target(row_layout, places, views, task, start, stop):  # type: ignore[no-untyped-def]
        """Where a component is written first: its final place, the slot for the others, or memory of its own."""
        if places[row_layout.name] is not None:
            return places[row_layout.name]
        if row_layout.name in views and task.device.type == "cpu":
            return views[row_layout.name]
        return torch.empty(row_layout.count(start, stop), dtype=row_layout.dtype, device=task.device)

    def _wanted(self, chunk: Chunk) -> int:
        """Mask of the components that other ranks need of these rows."""
        shared = len(chunk.read.owners) > 1
        return sum(1 << i for i, row_layout in enumerate(chunk.task.row_layouts) if row_layout.whole or shared)

    def _tell(self, receivers: tuple[int, ...], message: Message) -> None:
        start = perf_counter()
        self._sender.tell(receivers, message)
        self.stages.add("exchange", start, self.tasks[message.tensor].name)

    def _room(self, nbytes: int, receivers: int) -> tuple[int, int]:
        """Slot and offset to send from; waits for the ranks that still copy from all of them."""
        start = perf_counter()
        found = self._sender.room(nbytes, receivers)
        self.stages.add("exchange", start)
        return found

    # -- order and completion --------------------------------------------------------------------------------------

    def _hold_back(self, task: Task) -> None:
        """Waits until the statistics of tensors in work, this one's included, fit beside the slots."""
        arrivals = self.arrivals
        while arrivals.next < task.index and arrivals.unfinished_statistics(task) > self.budget.statistics:
            start = perf_counter()
            self._sender.flush()
            arrivals.await_next()
            self.stages.add("exchange", start)
            self._finish_arrived()

    def _finish_arrived(self) -> None:
        """Finishes the tensors that are complete, in order."""
        while self.arrivals.next_is_complete():
            task = self.tasks[self.arrivals.next]
            if not task.is_for(self.rank):
                self.arrivals.finished()
                continue
            sink = self._sink(task)
            start = perf_counter()
            if self._joined:
                self._sender.flush()
            self._finish(task, sink)
            self.stages.add("quantize" if task.encode is not None else "place", start, task.name)
            with self._sink_lock:
                del self._sinks[task.index]
            self.arrivals.finished()

    def _sink(self, task: Task) -> Sink:
        with self._sink_lock:
            if task.index not in self._sinks:
                self._sinks[task.index] = self._make_sink(task)
            return self._sinks[task.index]

    # -- the listening thread --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Takes over the main thread's streams: memory that one thread makes, the other may fill or use at once."""
        for stream in self._streams:
            torch.accelerator.set_stream(stream)

    def copy(self, peer: Peer, message: Message) -> int:
        """Copies what this rank keeps out of another's memory."""
        task = self.tasks[message.tensor]
        sink = self._sink(task)
        begun = perf_counter()
        payload, _ = task.payload(message.start, message.stop, message.mask)
        received = 0
        for row_layout, at, nbytes in payload:
            first = message.offset + at
            values = peer.memory[first : first + nbytes].view(row_layout.dtype)
            received += sink.place(row_layout, values, message.start, message.stop)
        self.moved.received += received
        self.stages.add("exchange", begun, task.name, received)
        return received

    def arrived(self, message: Message) -> None:
        self.arrivals.count(self.tasks[message.tensor], message.start, message.stop)

    def freed(self, message: Message) -> None:
        self.moved.sent += message.offset
        (self._reads if message.slot < READ_SLOTS else self._sends).release(message.slot, message.stop)
