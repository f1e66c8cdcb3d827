"""One tensor's work on one node: where its rows lie, who reads which, and in what form they are handed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from distquant.dtypes import TORCH_NAMES
from distquant.loading.stream.rows import RowMap, RowRange
from distquant.planning.read_assignment import Part
from distquant.sharding.partition import Segment
from distquant.sharding.row_layout import RowLayout

TORCH_DTYPE = {stored: getattr(torch, name) for stored, name in TORCH_NAMES.items()}
"""torch's dtype by safetensors' name."""

ALIGN = 64
"""Components of a piece start at multiples of this many bytes."""

PLACED = 32 << 20
"""Bytes that are read straight into place at once, beside what goes through a slot."""

Encode = Callable[[Tensor, dict[str, Tensor]], None]
"""Fills the components (flat, by name) from rows `[n, columns]` in the load dtype."""


class Sink(Protocol):
    """Where a rank puts what it keeps of a tensor."""

    def direct(self, row_layout: RowLayout, start: int, stop: int) -> Tensor | None:
        """Final memory for all of rows `[start, stop)` of a component, flat; None where it is not one run."""

    def holds(self, row_layout: RowLayout, start: int, stop: int) -> bool:
        """Whether `direct` gives memory; itself it makes none."""

    def place(self, row_layout: RowLayout, values: Tensor, start: int, stop: int) -> int:
        """Copies what is kept of rows `[start, stop)`; returns the bytes of it."""


@dataclass(slots=True)
class Task:
    """One tensor of the plan.

    Attributes:
        index: position in the order of loading, the same on every rank.
        name: path in the model.
        rows: where its rows lie (as they are stored: turned, if `transposed`).
        columns: columns that this node reads of every row.
        step: rows that are quantized together.
        bands: components in which rows are handed on; a single one named "" for a tensor that stays as it is.
        parts: who reads which rows, in row order.
        dtype: what rows are cast to before they are quantized or placed.
        encode: how rows become components; None = they stay as they are.
        turned: whether it is stored `[in, out]`, and gathered and turned by its reader.
        device: where rows are quantized.
        keepers: ranks of the node that keep something of it; None = all of them.
    """

    index: int
    name: str
    rows: RowMap
    columns: Segment
    step: int
    row_layouts: tuple[RowLayout, ...]
    parts: Sequence[Part]
    dtype: torch.dtype
    encode: Encode | None
    transposed: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    owners: tuple[int, ...] | None = None
    replicated: bool = field(init=False)
    """Whether a component is needed by every rank that keeps something, for all rows."""
    statistics_bytes: int = field(init=False)
    """Bytes of the components that every rank holds whole until the tensor is finished."""
    row_bytes: int = field(init=False)
    """Bytes that are read of a row."""

    def __post_init__(self) -> None:
        whole = [row_layout for row_layout in self.row_layouts if row_layout.whole]
        self.replicated = bool(whole)
        self.statistics_bytes = sum(row_layout.nbytes(0, row_layout.rows) for row_layout in whole)
        width = self.columns[1] - self.columns[0]
        self.row_bytes = self.rows.row_bytes() // max(self.rows.width, 1) * width

    def is_for(self, rank: int) -> bool:
        """Whether a rank of the node keeps something of it."""
        return self.owners is None or rank in self.owners

    def expected(self, rank: int) -> int:
        """Rows that come to a rank of this node."""
        if not self.is_for(rank):
            return 0
        mine = (part for part in self.parts if self.replicated or rank in part.owners)
        return sum(part.rows[1] - part.rows[0] for part in mine)

    def payload(self, start: int, stop: int, mask: int) -> tuple[list[tuple[RowLayout, int, int]], int]:
        """How the components in a mask lie one after the other: (band, byte offset, bytes), and all bytes."""
        found, at = [], 0
        for number, row_layout in enumerate(self.row_layouts):
            if mask >> number & 1:
                nbytes = row_layout.nbytes(start, stop)
                found.append((row_layout, at, nbytes))
                at += -(-nbytes // ALIGN) * ALIGN
        return found, at

    def rows_within(self, capacity: int) -> int:
        """Rows that fit into `capacity` bytes, read as well as encoded; at least one step."""
        read = self.row_bytes * self.step
        encoded = sum(row_layout.nbytes(0, min(self.step, row_layout.rows)) for row_layout in self.row_layouts)
        room = capacity - len(self.row_layouts) * ALIGN
        return max(room // max(read, encoded, 1), 1) * self.step


@dataclass(slots=True)
class Chunk:
    """Consecutive rows that this rank reads at once.

    Attributes:
        task: the tensor.
        part: what the rows are a part of.
        start, stop: the rows.
        ranges: where they lie.
        into: gives the final memory (uint8, flat) that they are read into; None = they pass through a slot.
        raw: uint8, flat, once they are read.
        slot: the slot that `raw` lies in.
        at: byte of the slot that it begins at.
        direct: whether it is read past the page cache.
    """

    task: Task
    part: Part
    start: int
    stop: int
    ranges: list[RowRange]
    into: Callable[[], Tensor] | None = None
    raw: Tensor | None = None
    slot: int = -1
    at: int = 0
    direct: bool = False

    nbytes: int = field(init=False)
    """Bytes that are read."""
    span: tuple[str, int, int] | None = field(init=False)
    """(file, first byte, last byte) if the rows are one run of bytes in one file."""

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
    """What a rank reads of a tensor, in pieces that fit into a slot."""
    for part in task.parts:
        if part.reader != rank:
            continue
        first, last = (0, task.rows.rows) if task.transposed else part.rows
        most = task.rows_within(capacity)
        for start in range(first, last, most):
            yield from _same_dtype(task, part, start, min(start + most, last))


def _same_dtype(task: Task, part: Part, start: int, stop: int) -> Iterator[Chunk]:
    """One chunk, or one for each source where the sources of these rows have several dtypes."""
    ranges = task.rows.ranges((start, stop), task.columns)
    if len({piece.dtype for piece in ranges}) == 1:
        yield Chunk(task, part, start, stop, ranges)
        return
    for piece in ranges:
        yield Chunk(task, part, start, start + piece.rows, [piece])
        start += piece.rows


def batches(chunks: Iterator[Chunk], capacity: int) -> Iterator[list[Chunk]]:
    """What is read at once: pieces that fit into one slot together, and those that go straight into their place.

    Past the page cache only neighbours in a file are read at once.
    """
    batch: list[Chunk] = []
    filled = placed = 0
    for chunk in chunks:
        at = filled
        if chunk.direct:
            joins = bool(batch) and batch[-1].direct and _neighbours(batch[-1], chunk)
        else:
            at = -(-filled // ALIGN) * ALIGN
            joins = not (batch and batch[-1].direct)
        if chunk.into is not None:
            joins = joins and placed + chunk.nbytes <= PLACED
        else:
            joins = joins and at + chunk.nbytes <= capacity
        if batch and not joins:
            yield batch
            batch, at, filled, placed = [], 0, 0, 0
        if chunk.into is not None:
            placed += chunk.nbytes
        else:
            chunk.at, filled = at, at + chunk.nbytes
        batch.append(chunk)
    if batch:
        yield batch


def _neighbours(chunk: Chunk, following: Chunk) -> bool:
    """Whether a piece ends where the next begins, in one file."""
    span, after = chunk.span, following.span
    return span is not None and after is not None and (span[0], span[2]) == (after[0], after[1])
