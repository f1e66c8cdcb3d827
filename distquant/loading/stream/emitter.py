"""Turns rows that were read into components: in their final place, and in slots that other ranks copy from.

Runs on the main thread. A piece is read by one rank of the node and encoded by that rank alone, whoever keeps it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from distquant.errors import InputError
from distquant.loading.stream.arrivals import ArrivalTracker
from distquant.loading.stream.budget import Budget
from distquant.loading.stream.copier import Copier
from distquant.loading.stream.messages import DATA, Message
from distquant.loading.stream.sender import Sender
from distquant.loading.stream.sinks import Sinks
from distquant.loading.stream.stage_timer import StageTimer
from distquant.loading.stream.staging_buffer import Slots, StagingBuffer
from distquant.loading.stream.tasks import TORCH_DTYPE, Chunk, Task
from distquant.sharding.row_layout import RowLayout


@dataclass(kw_only=True)
class Emitter:
    """Places and sends the pieces that this rank has read, one at a time.

    Attributes:
        rank: this rank.
        others: other ranks of the node.
        budget: bytes of a piece.
        staging_buffer: the staging memory.
        reads: its slots to read into.
        sender: gives room in the slots to send from.
        copier: copies rows to devices.
        arrivals: counts rows that are in their place.
        sinks: final memory.
        timer: of the stages.
    """

    rank: int
    others: Collection[int]
    budget: Budget
    staging_buffer: StagingBuffer
    reads: Slots
    sender: Sender
    copier: Copier
    arrivals: ArrivalTracker
    sinks: Sinks
    timer: StageTimer
    _transposing: dict[int, Tensor] = field(default_factory=dict)
    """Tensors that are stored `[in, out]`, by task, as far as they have been read."""
    _lent: bool = False
    """True if messages are kept back about slots to read into: there are few, and reads wait for them."""

    def receivers(self, chunk: Chunk) -> tuple[int, ...]:
        """Returns the other ranks of the node that keep something of these rows."""
        if chunk.task.replicated:
            return tuple(filter(chunk.task.is_for, self.others))
        return tuple(rank for rank in chunk.read.owners if rank != self.rank)

    def consume(self, chunk: Chunk) -> None:
        """Places the rows of a chunk that has been read, and sends them; its slot becomes free."""
        task = chunk.task
        if chunk.into is not None:
            self.arrivals.count(task, chunk.start, chunk.stop)  # they were read into their final place
            return
        assert chunk.raw is not None
        start = perf_counter()
        stored = TORCH_DTYPE[chunk.ranges[0].dtype]
        # A header may have any length, so elements may begin between the multiples of their size: torch views no such
        # bytes, a copy begins on a multiple.
        on_grid = chunk.raw.storage_offset() % stored.itemsize == 0
        raw = chunk.raw if on_grid else chunk.raw.clone()
        rows = raw.view(stored).view(chunk.stop - chunk.start, -1)
        unchanged = on_grid and task.encode is None and rows.dtype == task.dtype and not task.transposed
        receivers = self.receivers(chunk)
        # On a device, rows without receivers go the way of all others: the copier overlaps their copy with reads.
        if unchanged and (task.device.type == "cpu" or receivers):
            self._pass_on(chunk, rows.view(-1), receivers)
            self.reads.release(chunk.slot)
            return
        rows = self.copier.to_device(rows, task.device, lambda: self.reads.release(chunk.slot))
        rows = rows.to(task.dtype)  # cast before quantizing: the dtype of the load decides the codes
        self.timer.add("copy", start, task.name, chunk.nbytes)
        if task.transposed:
            self._transpose(chunk, rows, receivers)
        else:
            self._emit(chunk, rows, chunk.start, chunk.stop, receivers)
        if task.device.type == "cpu":
            self.reads.release(chunk.slot)  # elsewhere the copier does, when the copy is done

    def end_batch(self, idle: bool) -> None:
        """Sends messages that were kept back, if reads wait for the slots that they are about, or if it is idle now.

        Args:
            idle: True if the next batch is not read yet.
        """
        if self._lent or idle:
            self.sender.push()
            self._lent = False

    def clear(self) -> None:
        """Forgets tensors that have been read in part."""
        self._transposing.clear()

    def _pass_on(self, chunk: Chunk, values: Tensor, receivers: tuple[int, ...]) -> None:
        """Places and sends rows that stay unchanged: others copy from the slot that they were read into."""
        task = chunk.task
        if receivers:
            self._lent = True
            self.reads.hold(chunk.slot, len(receivers))
            offset = values.data_ptr() - self.staging_buffer.memory.data_ptr()
            # Send before placing: others may copy from the slot while this rank does.
            self._send(receivers, Message(DATA, chunk.slot, task.index, 1, chunk.start, chunk.stop, offset))
        start = perf_counter()
        nbytes = self.sinks.of(task).place(task.row_layouts[0], values, chunk.start, chunk.stop)
        self.timer.add("place", start, task.name, nbytes)
        self.arrivals.count(task, chunk.start, chunk.stop)

    def _transpose(self, chunk: Chunk, rows: Tensor, receivers: tuple[int, ...]) -> None:
        """Collects a tensor that is stored `[in, out]`; emits it as `[out, in]` when its last row is there."""
        task = chunk.task
        if task.index not in self._transposing:
            shape = (task.rows.rows, task.rows.width)
            self._transposing[task.index] = torch.empty(shape, dtype=task.dtype, device=task.device)
        stored = self._transposing[task.index]
        stored[chunk.start : chunk.stop] = rows
        if chunk.stop < task.rows.rows:
            return
        del self._transposing[task.index]
        most = task.rows_within(self.budget.piece)
        for first in range(0, task.row_layouts[0].rows, most):
            last = min(first + most, task.row_layouts[0].rows)
            self._emit(chunk, stored[:, first:last].t().contiguous(), first, last, receivers)

    def _emit(self, chunk: Chunk, rows: Tensor, start: int, stop: int, receivers: tuple[int, ...]) -> None:
        """Encodes rows into their final place or a slot, and sends them to the ranks that keep something of them."""
        task = chunk.task
        _check_aligned(task, start, stop)
        # One payload for all receivers: each copies only what it keeps of it, so rows are encoded and written once.
        mask = _shared_components(chunk) if receivers else 0
        payload, nbytes = task.payload(start, stop, mask)
        slot, offset, views = -1, 0, {}
        if payload:
            # Take room before encoding: on the CPU, components may be encoded right into the slot.
            slot, offset = self._room(nbytes, len(receivers))
            memory = self.staging_buffer.memory[offset : offset + nbytes]
            views = {
                row_layout.name: memory[begin : begin + size].view(row_layout.dtype)
                for row_layout, begin, size in payload
            }
        begun = perf_counter()
        sink = self.sinks.of(task)
        # Where rows go to one run of final memory, components are encoded right there, and this rank copies nothing.
        places = {row_layout.name: sink.direct(row_layout, start, stop) for row_layout in task.row_layouts}
        out = {
            row_layout.name: _target(task, row_layout, places, views, start, stop) for row_layout in task.row_layouts
        }
        if task.encode is not None:
            task.encode(rows, out)
            begun = self.timer.add("quantize", begun, task.name, rows.nbytes)
        else:
            out[""].copy_(rows.reshape(-1))
        # Each component was written once, to the first target that fits: copy it to the others that need it.
        copies = [(view, out[name]) for name, view in views.items() if out[name] is not view]
        on_device = task.device.type != "cpu"
        from_slot: list[RowLayout] = []
        written: torch.Event | None = None
        if on_device and copies:
            written = self.copier.from_device(copies, task.device)
            from_slot = [each for each in task.row_layouts if each.name in views and sink.gathers(each)]
        else:
            for view, encoded in copies:
                view.copy_(encoded)
        for row_layout in task.row_layouts:
            encoded = out[row_layout.name]
            if encoded is not places[row_layout.name] and row_layout not in from_slot:
                sink.place(row_layout, encoded, start, stop)
        self.timer.add("place", begun, task.name, nbytes)

        def send() -> None:
            for row_layout in from_slot:  # what is gathered on the host is there by now
                sink.place(row_layout, views[row_layout.name], start, stop)
            if payload:
                self._send(receivers, Message(DATA, slot, task.index, mask, start, stop, offset))
            self.arrivals.count(task, start, stop)

        self.sender.when_written(written, task.device, send)

    def _send(self, receivers: tuple[int, ...], message: Message) -> None:
        start = perf_counter()
        self.sender.send(receivers, message)
        self.timer.add("exchange", start, self.arrivals.tasks[message.tensor].name)

    def _room(self, nbytes: int, receivers: int) -> tuple[int, int]:
        """Returns slot and offset to send from; waits for ranks that still copy, where all slots are in use."""
        start = perf_counter()
        room = self.sender.room(nbytes, receivers)
        self.timer.add("exchange", start)
        return room


def _check_aligned(task: Task, start: int, stop: int) -> None:
    """Raises `InputError` where the parts of a checkpoint divide a quantization block."""
    if start % task.step or (stop % task.step and stop < task.row_layouts[0].rows):
        problem = f"its parts start at row {start}, quantization blocks need multiples of {task.step}"
        raise InputError.one(task.name, problem, "Skip the module, or convert the checkpoint first")


def _target(
    task: Task,
    row_layout: RowLayout,
    places: Mapping[str, Tensor | None],
    views: Mapping[str, Tensor],
    start: int,
    stop: int,
) -> Tensor:
    """Returns where a component is written first: its final place, a slot for the others, or temporary memory."""
    place = places[row_layout.name]
    if place is not None and place.device.type == task.device.type:
        return place
    # Slots are host memory, and so is memory to gather in: a device cannot encode into them.
    if row_layout.name in views and task.device.type == "cpu":
        return views[row_layout.name]
    return torch.empty(row_layout.count(start, stop), dtype=row_layout.dtype, device=task.device)


def _shared_components(chunk: Chunk) -> int:
    """Returns the mask of the components that other ranks need of these rows."""
    shared = len(chunk.read.owners) > 1
    return sum(1 << i for i, row_layout in enumerate(chunk.task.row_layouts) if row_layout.replicated or shared)
