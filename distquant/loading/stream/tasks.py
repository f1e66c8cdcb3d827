"""The work of a node: where rows are stored, which rank reads which of them, and in what form they are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distquant.dtypes import TORCH_NAMES
from distquant.planning.read_assignment import ReadItem
from distquant.planning.row_map import RowMap, RowRange
from distquant.planning.slots import ALIGN, statistics_bytes
from distquant.planning.transfers import Transfer, TransferKind
from distquant.sharding.partition import Segment
from distquant.sharding.row_layout import RowLayout

TORCH_DTYPE = {stored: getattr(torch, name) for stored, name in TORCH_NAMES.items()}
"""torch's dtype by safetensors' name."""

PLACED = 32 << 20
"""Bytes that are read directly into place at once, beside what goes through a slot."""

Encode = Callable[[Tensor, dict[str, Tensor]], None]
"""Fills the components (flat, by name) from rows `[n, columns]` in the load dtype."""


class Sink(Protocol):
    """Memory for what a rank keeps of a tensor."""

    def direct(self, row_layout: RowLayout, start: int, stop: int) -> Tensor | None:
        """Returns the final memory of rows `[start, stop)` of a component, flat; None where it is not one run."""

    def holds(self, row_layout: RowLayout, start: int, stop: int) -> bool:
        """Returns True if `direct` gives memory, and makes none itself."""

    def gathers(self, row_layout: RowLayout) -> bool:
        """Returns True if the memory of a tensor that goes to a device is on the host for now."""

    def place(self, row_layout: RowLayout, values: Tensor, start: int, stop: int) -> int:
        """Copies what is kept of rows `[start, stop)`; returns the bytes of it."""


def kept_bytes(kind: TransferKind, row_layout: RowLayout) -> int:
    """Returns the bytes that a rank keeps of a component, about: ranks' shares differ by a step of rows or columns."""
    total = row_layout.nbytes(0, row_layout.rows)
    return total if row_layout.replicated or kind.partition is None else total // len(kind.partition.parts)


@dataclass(slots=True)
class Task:
    """One transfer of the plan on one node, as a rank carries it out.

    Attributes:
        index: position in the order of loading, the same on every rank.
        transfer: the planned transfer.
        rows: where its rows are stored; the rows of a transposed tensor are its logical columns.
        columns: columns of the stored rows that this node reads.
        reads: which rank reads which rows, in row order.
        row_layouts: components in which rows are sent; a single one named "" for a tensor that stays as it is.
        dtype: dtype that rows are cast to before they are quantized or placed.
        encode: turns rows into components; None = they stay as they are.
        device: where rows are quantized.
        owners: ranks of the node that keep something of it; None = all of them.
        replicated: True if every rank that keeps something needs a component for all rows.
        statistics_bytes: bytes of the components that every rank holds for all rows until the tensor is finished.
        on_host: components that a rank gathers on the host, because they come in parts and go to a device.
        unfinished_bytes: bytes that a rank takes until it is finished, beside its final memory.
    """

    index: int
    transfer: Transfer
    rows: RowMap
    columns: Segment
    reads: Sequence[ReadItem]
    row_layouts: tuple[RowLayout, ...]
    dtype: torch.dtype
    encode: Encode | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    owners: tuple[int, ...] | None = None
    on_host: frozenset[str] = frozenset()
    replicated: bool = field(init=False)
    statistics_bytes: int = field(init=False)
    unfinished_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.replicated = any(row_layout.replicated for row_layout in self.row_layouts)
        self.statistics_bytes = statistics_bytes(self.row_layouts) if self.replicated else 0
        self.unfinished_bytes = self.statistics_bytes
        if self.on_host:
            self.unfinished_bytes += sum(
                kept_bytes(self.transfer.kind, row_layout)
                for row_layout in self.row_layouts
                if row_layout.name in self.on_host and not row_layout.replicated
            )

    @property
    def row_bytes(self) -> int:
        """Bytes that are read of a row."""
        width = self.columns[1] - self.columns[0]
        return self.rows.row_bytes() // max(self.rows.width, 1) * width

    @property
    def name(self) -> str:
        """Path in the model."""
        return self.transfer.tensor.name

    @property
    def step(self) -> int:
        """Number of rows that are quantized together."""
        return self.transfer.kind.row_step

    @property
    def transposed(self) -> bool:
        """True if it is stored `[in, out]`, so that its reader collects all of it before it transposes it."""
        return self.transfer.transposed

    def is_for(self, rank: int) -> bool:
        """Returns True if a rank of the node keeps something of it."""
        return self.owners is None or rank in self.owners

    def expected(self, rank: int) -> int:
        """Returns the number of rows that come to a rank of this node."""
        if not self.is_for(rank):
            return 0
        mine = (read for read in self.reads if self.replicated or rank in read.owners)
        return sum(read.rows[1] - read.rows[0] for read in mine)

    def payload(self, start: int, stop: int, mask: int) -> tuple[list[tuple[RowLayout, int, int]], int]:
        """Returns how the components in a mask follow each other: (layout, byte offset, bytes) of each; all bytes."""
        found, offset = [], 0
        for number, row_layout in enumerate(self.row_layouts):
            if mask >> number & 1:
                nbytes = row_layout.nbytes(start, stop)
                found.append((row_layout, offset, nbytes))
                offset += -(-nbytes // ALIGN) * ALIGN
        return found, offset

    def rows_within(self, capacity: int) -> int:
        """Returns the rows that fit into `capacity` bytes, both as read and as encoded; at least one step."""
        read = self.row_bytes * self.step
        encoded = sum(row_layout.nbytes(0, min(self.step, row_layout.rows)) for row_layout in self.row_layouts)
        room = capacity - len(self.row_layouts) * ALIGN
        return max(room // max(read, encoded, 1), 1) * self.step


@dataclass(slots=True)
class Chunk:
    """Consecutive rows that this rank reads at once.

    Attributes:
        task: the tensor.
        read: the assigned read that the rows are a part of.
        start, stop: the rows.
        ranges: where they are stored.
        into: gives the final memory (uint8, flat) that they are read into; None = they pass through a slot.
        raw: uint8, flat, once they are read.
        slot: the slot that `raw` is in.
        slot_offset: byte of the slot that it begins at.
        direct: True if it is read past the page cache.
        nbytes: bytes that are read.
        span: (file, first byte, last byte) if the rows are one run of bytes in one file.
    """

    task: Task
    read: ReadItem
    start: int
    stop: int
    ranges: list[RowRange]
    into: Callable[[], Tensor] | None = None
    raw: Tensor | None = None
    slot: int = -1
    slot_offset: int = 0
    direct: bool = False
    nbytes: int = field(init=False)
    span: tuple[str, int, int] | None = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(piece.nbytes for piece in self.ranges)
        self.span = _span(self.ranges)


def _span(ranges: Sequence[RowRange]) -> tuple[str, int, int] | None:
    first = ranges[0]
    end = first.offset
    for piece in ranges:
        if not piece.contiguous or piece.file != first.file or piece.offset != end:
            return None
        end += piece.nbytes
    return first.file, first.offset, end


def chunks_of(task: Task, rank: int, capacity: int) -> Iterator[Chunk]:
    """Yields what a rank reads of a tensor, in pieces that fit into a slot."""
    for read in task.reads:
        if read.reader != rank:
            continue
        # The rows of a transposed tensor are logical columns: its only reader takes all of them.
        first, last = (0, task.rows.rows) if task.transposed else read.rows
        most = task.rows_within(capacity)
        for start in range(first, last, most):
            yield from _same_dtype(task, read, start, min(start + most, last))


def _same_dtype(task: Task, read: ReadItem, start: int, stop: int) -> Iterator[Chunk]:
    """Yields one chunk, or one for each source where the sources of these rows have several dtypes."""
    ranges = task.rows.ranges((start, stop), task.columns)
    if len({piece.dtype for piece in ranges}) == 1:
        yield Chunk(task, read, start, stop, ranges)
        return
    for piece in ranges:
        yield Chunk(task, read, start, start + piece.rows, [piece])
        start += piece.rows


def batches(chunks: Iterator[Chunk], capacity: int) -> Iterator[list[Chunk]]:
    """Yields what is read at once: pieces that fit into one slot together, and those that go directly into place.

    Past the page cache only neighbours in a file are read at once.
    """
    batch: list[Chunk] = []
    filled = placed = 0
    for chunk in chunks:
        offset = filled
        if chunk.direct:
            # One read of a run of bytes fills the slot without gaps, so nothing can be aligned in between.
            joins = bool(batch) and batch[-1].direct and _neighbours(batch[-1], chunk)
        else:
            offset = -(-filled // ALIGN) * ALIGN
            joins = not (batch and batch[-1].direct)
        if chunk.into is not None:
            joins = joins and placed + chunk.nbytes <= PLACED
        else:
            joins = joins and offset + chunk.nbytes <= capacity
        if batch and not joins:
            yield batch
            batch, offset, filled, placed = [], 0, 0, 0
        if chunk.into is not None:
            placed += chunk.nbytes
        else:
            chunk.slot_offset, filled = offset, offset + chunk.nbytes
        batch.append(chunk)
    if batch:
        yield batch


def _neighbours(chunk: Chunk, following: Chunk) -> bool:
    """Returns True if a piece ends where the next begins, in one file."""
    span, after = chunk.span, following.span
    return span is not None and after is not None and (span[0], span[2]) == (after[0], after[1])
