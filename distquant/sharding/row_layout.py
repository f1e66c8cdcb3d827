"""Components of a weight while rows travel, from the rank that quantizes them to their owners.

A row layout gives the elements of a component that lie before a row, and the elements of a row that belong to a run of
columns. Both follow from the component's layout. Nothing else is needed to slice rows after they were quantized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distquant.sharding.layout import ALL, Component
from distquant.sharding.partition import Segment


@dataclass(frozen=True, slots=True)
class RowLayout:
    """One component of consecutive rows.

    Attributes:
        name: of the component.
        dtype: of its elements.
        rows: of the weight.
        width: columns of the weight that travel.
        row_block: rows that share an element.
        column_block: columns that share an element; 0 where elements straddle rows.
        flat: elements of the weight per element of the component, where they straddle rows.
        replicated: True if every rank needs it for all rows and columns (a statistic over the tensor).
    """

    name: str
    dtype: torch.dtype
    rows: int
    width: int
    row_block: int = 1
    column_block: int = 1
    flat: int = 0
    replicated: bool = False

    @property
    def per_row(self) -> int:
        """Elements of a row (of `row_block` rows)."""
        return -(-self.width // self.column_block)

    def before(self, row: int) -> int:
        """Returns the elements that lie before a row: a multiple of `row_block`, or the number of rows."""
        if not self.column_block:
            return -(-row * self.width // self.flat)
        return -(-row // self.row_block) * self.per_row

    def count(self, start: int, stop: int) -> int:
        """Returns the number of elements of rows `[start, stop)`."""
        return self.before(stop) - self.before(start)

    def nbytes(self, start: int, stop: int) -> int:
        """Returns the bytes of rows `[start, stop)`."""
        return self.count(start, stop) * self.dtype.itemsize

    def columns(self, start: int, stop: int) -> Segment:
        """Returns the elements of a row under columns `[start, stop)`."""
        return start // self.column_block, -(-stop // self.column_block)


def row_layout_of(component: Component, shape: Sequence[int], replicated: bool = False) -> RowLayout:
    """Returns the row layout of a component of a weight `[rows, width]`."""
    rows, width = shape
    dtype = getattr(torch, component.dtype)
    if component.flat:
        # Flat blocks that fill rows exactly are blocks of columns, which can be sliced; others straddle rows.
        columns = component.flat if width % component.flat == 0 else 0
        return RowLayout(component.name, dtype, rows, width, 1, columns, component.flat, replicated)
    down, across = component.block_shape
    if down == ALL:
        raise ValueError(f"component {component.name!r} reduces over all rows, so it cannot be sent row by row")
    return RowLayout(
        component.name, dtype, rows, width, down, max(width, 1) if across == ALL else across, 0, replicated
    )


def row_step(components: Sequence[Component], shape: tuple[int, int]) -> int:
    """Returns the rows that must be quantized together: no component has an element that ends within them."""
    return math.lcm(
        *(
            component.alignments(shape, 0)[-1] if component.flat else component.block_shape[0]
            for component in components
        )
    )


def column_step(components: Sequence[Component], shape: tuple[int, int]) -> int | None:
    """Returns the alignment at which columns may be quantized separately.

    None where an element needs the whole row, or straddles rows.
    """
    steps = []
    for component in components:
        if component.flat:
            if shape[1] % component.flat:
                return None
            steps.append(component.flat)
        elif component.block_shape[1] == ALL:
            return None
        else:
            steps.append(component.block_shape[1])
    return math.lcm(*steps)
