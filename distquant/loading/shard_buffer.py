"""Where a rank puts what it keeps of a tensor: the memory of its components, and the rows and columns that go there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distquant.memory import MEMORY
from distquant.sharding.partition import Segment
from distquant.sharding.row_layout import RowLayout

Allocator = Callable[[str, int, torch.dtype], Tensor | None]
"""Memory for a component of so many elements of a dtype, flat."""


class ShardBuffer:
    """Final memory of all components of one tensor, made when the first rows arrive, and filled as they do.

    Args:
        bands: components as they flow over this node, `columns` wide.
        columns: columns of the tensor that flow over this node.
        width: columns of the whole tensor.
        rows: segments of rows that are kept, in local order.
        kept: segments of columns that are kept, in local order.
        device: where the memory lies.
        partial: whether other nodes hold statistics that this one does not see.
        home: gives the memory that is there for a component (flat), or None for it to be made here.
    """

    def __init__(
        self,
        row_layouts: Sequence[RowLayout],
        columns: Segment,
        width: int,
        rows: Sequence[Segment],
        kept: Sequence[Segment],
        device: torch.device,
        partial: bool = False,
        home: Allocator | None = None,
    ):
        self.columns, self.kept, self.device, self.partial = columns, tuple(kept), device, partial
        self.windows = _windows(rows)
        self.uncut = self.kept == (columns,)
        local_rows = sum(stop - start for start, stop in rows)
        local_width = sum(stop - start for start, stop in kept)
        self.own = {}
        for row_layout in row_layouts:
            own_rows, own_width = (row_layout.rows, width) if row_layout.whole else (local_rows, local_width)
            same = (own_rows, own_width) == (row_layout.rows, row_layout.width)
            self.own[row_layout.name] = row_layout if same else replace(row_layout, rows=own_rows, width=own_width)
        self._home = home
        self._memory: dict[str, Tensor] | None = None
        self._lock = threading.Lock()

    @property
    def memory(self) -> dict[str, Tensor]:
        """Flat, by component. Several threads may read or place the first rows at once."""
        with self._lock:
            if self._memory is None:
                self._memory = {name: self._make(row_layout) for name, row_layout in self.own.items()}
            return self._memory

    def _make(self, row_layout: RowLayout) -> Tensor:
        count = row_layout.before(row_layout.rows)
        there = (
            self._home(row_layout.name, count, row_layout.dtype)
            if self._home is not None and not row_layout.whole
            else None
        )
        if there is not None:
            return there
        if row_layout.whole:  # gone when the tensor is finished: the allocator's, which has it for the next one again
            make = torch.zeros if self.partial else torch.empty
            return make(count, dtype=row_layout.dtype, device=self.device)
        return MEMORY.empty(count, row_layout.dtype, self.device)

    def direct(self, row_layout: RowLayout, start: int, stop: int) -> Tensor | None:
        """Final memory of all of rows `[start, stop)`, flat; None where they do not go to one run of it."""
        run = self._run(row_layout, start, stop)
        return None if run is None else self.memory[row_layout.name][run[0] : run[1]]

    def holds(self, row_layout: RowLayout, start: int, stop: int) -> bool:
        """Whether `direct` will give memory."""
        return self._run(row_layout, start, stop) is not None

    def _run(self, row_layout: RowLayout, start: int, stop: int) -> Segment | None:
        """Elements of the final memory that all of rows `[start, stop)` go to; None where that is no run."""
        own = self.own[row_layout.name]
        if own.width != row_layout.width or not (row_layout.whole or self.uncut):
            return None
        if row_layout.whole:
            return own.before(start), own.before(stop)
        places = [(a, b, local) for a, b, local in self.windows if a < stop and start < b]
        if len(places) != 1 or start < places[0][0] or places[0][1] < stop:
            return None
        first = own.before(places[0][2] + start - places[0][0])
        return first, first + row_layout.count(start, stop)

    def place(self, row_layout: RowLayout, values: Tensor, start: int, stop: int) -> int:
        """Copies what is kept of rows `[start, stop)` (flat `values`); returns the bytes of it."""
        own, memory = self.own[row_layout.name], self.memory[row_layout.name]
        windows = [(0, row_layout.rows, 0)] if row_layout.whole else self.windows
        kept = [self.columns] if row_layout.whole else self.kept
        moved = 0
        for a, b, local in windows:
            first, last = max(start, a), min(stop, b)
            if first >= last:
                continue
            source = values[row_layout.count(start, first) : row_layout.count(start, last)]
            at = local + first - a
            if own.width == row_layout.width and (row_layout.whole or self.uncut):
                target = memory[own.before(at) : own.before(at) + source.numel()]
                target.copy_(source)
                moved += source.nbytes
                continue
            wide = source.view(-1, row_layout.per_row)
            narrow = memory.view(-1, own.per_row)[at // row_layout.row_block :][: len(wide)]
            column = own.columns(self.columns[0], self.columns[0])[0] if row_layout.whole else 0
            for left, right in kept[: 1 if row_layout.column_block >= row_layout.width else None]:
                x, y = row_layout.columns(left - self.columns[0], right - self.columns[0])
                narrow[:, column : column + y - x] = wide[:, x:y]
                column += y - x
                moved += wide[:, x:y].nbytes
        return moved


def _windows(rows: Sequence[Segment]) -> list[tuple[int, int, int]]:
    """(first row, row after the last, local row of the first) of every segment."""
    found, local = [], 0
    for start, stop in rows:
        found.append((start, stop, local))
        local += stop - start
    return found
