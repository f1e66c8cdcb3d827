"""Memory for what a rank keeps of a tensor: its components, and the rows and columns that go there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distquant.loading.stream.gathering import Block, GatheringMemory
from distquant.memory import MEMORY
from distquant.sharding.partition import Segment
from distquant.sharding.row_layout import RowLayout

Allocator = Callable[[str, int, torch.dtype], Tensor | None]
"""Gives memory for a component of so many elements of a dtype, flat; None = there is none yet."""

Window = tuple[int, int, int]
"""First row of a kept segment, row after its last, local row of its first."""


class ShardBuffer:
    """Final memory of all components of one tensor, made when the first rows arrive, and filled as they do.

    Args:
        row_layouts: components as they arrive on this node, `columns` wide.
        columns: columns of the tensor that arrive on this node.
        width: columns of the tensor on all ranks together.
        rows: segments of rows that are kept, in local order.
        kept: segments of columns that are kept, in local order.
        device: of the memory.
        partial: True if other nodes hold statistics of rows that this one does not see.
        allocator: gives the memory of a component that is there already.
        on_host: components that are gathered on the host.
        gathering: gives memory for these.
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
        allocator: Allocator | None = None,
        on_host: frozenset[str] = frozenset(),
        gathering: GatheringMemory | None = None,
    ):
        self.columns, self.kept, self.device, self.partial = columns, tuple(kept), device, partial
        self.windows = _windows(rows)
        self.all_columns = self.kept == (columns,)
        """True if everything that arrives of a row is kept."""
        local_rows = sum(stop - start for start, stop in rows)
        local_width = sum(stop - start for start, stop in kept)
        self.own = {}
        """Layout of each component in this buffer: all rows and columns of a replicated one, the shard of others."""
        for row_layout in row_layouts:
            own_rows, own_width = (row_layout.rows, width) if row_layout.replicated else (local_rows, local_width)
            same = (own_rows, own_width) == (row_layout.rows, row_layout.width)
            self.own[row_layout.name] = row_layout if same else replace(row_layout, rows=own_rows, width=own_width)
        self._allocator, self._on_host, self._gathering = allocator, on_host, gathering
        self._blocks: dict[str, Block] = {}
        """Host memory of components that are gathered there, by component."""
        self._memory: dict[str, Tensor] | None = None
        self._lock = threading.Lock()

    @property
    def memory(self) -> dict[str, Tensor]:
        """Memory by component, flat; on the host for one that is gathered, until `upload`.

        Several threads may read or place the first rows at once.
        """
        with self._lock:
            if self._memory is None:
                self._memory = {name: self._make(row_layout) for name, row_layout in self.own.items()}
            return self._memory

    def _make(self, row_layout: RowLayout) -> Tensor:
        count = row_layout.before(row_layout.rows)
        if self.gathers(row_layout):
            assert self._gathering is not None
            nbytes = count * row_layout.dtype.itemsize
            block = self._blocks[row_layout.name] = self._gathering.take(nbytes, self.device)
            values = block.memory[:nbytes].view(row_layout.dtype)
            return values.zero_() if self.partial and row_layout.replicated else values
        return self._final(row_layout)

    def _final(self, row_layout: RowLayout) -> Tensor:
        """Returns new memory on the device."""
        count = row_layout.before(row_layout.rows)
        if row_layout.replicated:
            # Statistics are gone when the tensor is finished: torch's allocator keeps their memory for the next one.
            # Rows of other nodes are zero until the nodes' maximum is taken.
            make = torch.zeros if self.partial else torch.empty
            return make(count, dtype=row_layout.dtype, device=self.device)
        allocated = self._allocator(row_layout.name, count, row_layout.dtype) if self._allocator is not None else None
        return MEMORY.empty(count, row_layout.dtype, self.device) if allocated is None else allocated

    def gathers(self, row_layout: RowLayout) -> bool:
        """Returns True for a component that is gathered in host memory."""
        return row_layout.name in self._on_host

    def upload(self, keep: Collection[str] = ()) -> None:
        """Queues copies to the device of all that was gathered, once all of it is there; `keep` stays on the host."""
        memory = self.memory
        for name in self._blocks.keys() - set(keep):
            memory[name] = self._final(self.own[name]).copy_(memory[name], non_blocking=True)

    def release(self) -> None:
        """Gives the host memory back: all that it was needed for is queued on the device."""
        if self._gathering is not None:
            self._gathering.give_back(self._blocks.values())
        self._blocks.clear()

    def direct(self, row_layout: RowLayout, start: int, stop: int) -> Tensor | None:
        """Returns the final memory of rows `[start, stop)`, flat; None where they do not go to one run of it."""
        run = self._run(row_layout, start, stop)
        return None if run is None else self.memory[row_layout.name][run[0] : run[1]]

    def holds(self, row_layout: RowLayout, start: int, stop: int) -> bool:
        """Returns True if `direct` will give memory."""
        return self._run(row_layout, start, stop) is not None

    def _run(self, row_layout: RowLayout, start: int, stop: int) -> Segment | None:
        """Returns the elements that rows `[start, stop)` go to, if they are one run and all of them are kept."""
        own = self.own[row_layout.name]
        if own.width != row_layout.width or not (row_layout.replicated or self.all_columns):
            return None
        if row_layout.replicated:
            return own.before(start), own.before(stop)
        # More than one window: a rank that repeats rows keeps them in two places.
        windows = [window for window in self.windows if window[0] < stop and start < window[1]]
        if len(windows) != 1 or start < windows[0][0] or windows[0][1] < stop:
            return None
        first, _, local = windows[0]
        begin = own.before(local + start - first)
        return begin, begin + row_layout.count(start, stop)

    def place(self, row_layout: RowLayout, values: Tensor, start: int, stop: int) -> int:
        """Copies what is kept of rows `[start, stop)` (flat `values`); returns the bytes of it."""
        own, memory = self.own[row_layout.name], self.memory[row_layout.name]
        # A replicated component is kept for all rows, so its only window is the tensor.
        windows = [(0, row_layout.rows, 0)] if row_layout.replicated else self.windows
        # Elements may straddle rows, and then cannot be seen as rows: such a component is copied as one flat run.
        flat_run = own.width == row_layout.width and (row_layout.replicated or self.all_columns)
        placed = 0
        for window_start, window_stop, local in windows:
            first, last = max(start, window_start), min(stop, window_stop)
            if first >= last:
                continue
            source = values[row_layout.count(start, first) : row_layout.count(start, last)]
            local_row = local + first - window_start
            if flat_run:
                begin = own.before(local_row)
                memory[begin : begin + source.numel()].copy_(source)
                placed += source.nbytes
            else:
                placed += self._place_columns(row_layout, source, local_row)
        return placed

    def _place_columns(self, row_layout: RowLayout, source: Tensor, local_row: int) -> int:
        """Copies the kept columns of whole rows to a local row and the ones after it; returns the bytes of them."""
        own = self.own[row_layout.name]
        arrived = source.view(-1, row_layout.per_row)
        rows = self.memory[row_layout.name].view(-1, own.per_row)[local_row // row_layout.row_block :][: len(arrived)]
        # The node's columns of a replicated component keep their place among those of other nodes. Kept columns of
        # others follow each other from the first local one.
        kept = [self.columns] if row_layout.replicated else self.kept
        column = own.columns(self.columns[0], self.columns[0])[0] if row_layout.replicated else 0
        if row_layout.column_block >= row_layout.width:
            kept = kept[:1]  # one element spans the row: it belongs to every segment, and is copied once
        placed = 0
        for left, right in kept:
            # `kept` counts columns of the tensor, and only `columns` of them have arrived.
            begin, end = row_layout.columns(left - self.columns[0], right - self.columns[0])
            rows[:, column : column + end - begin] = arrived[:, begin:end]
            column += end - begin
            placed += arrived[:, begin:end].nbytes
        return placed


def _windows(rows: Sequence[Segment]) -> list[Window]:
    """Returns a window for every segment of rows."""
    found, local = [], 0
    for start, stop in rows:
        found.append((start, stop, local))
        local += stop - start
    return found
