"""Slots of the load buffer: one arithmetic for the planner's sums and for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

READ_SLOTS, SEND_SLOTS = 4, 4
"""Slots to read into, and slots from which other ranks copy. All have the size of the largest piece."""

PAGE = 4096
"""Bytes that reads past the page cache start and end on."""

SLACK = 2 * PAGE
"""Bytes by which a slot is larger than the piece that it holds."""

SLOT = 8 << 20
"""Bytes of a slot, at most: large enough for a disk and for few messages, small compared with the budget."""

STATISTICS = 8
"""Statistics of tensors that are not finished yet may take one part in this many of the budget."""

ALIGN = 64
"""Components of a piece start at multiples of this many bytes."""


class Rows(Protocol):
    """Consecutive rows of one component, as `sharding.row_layout.RowLayout` has them."""

    @property
    def rows(self) -> int:
        """Rows of the weight."""

    @property
    def replicated(self) -> bool:
        """True if every rank needs the component for all rows."""

    def nbytes(self, start: int, stop: int, /) -> int:
        """Returns the bytes of rows `[start, stop)`."""


def piece_bytes(staging: int) -> int:
    """Returns the bytes of a piece, as read and as quantized, where rows are small enough."""
    return max(min(staging // (READ_SLOTS + SEND_SLOTS) - SLACK, SLOT), 1)


def smallest_piece(row_bytes: int, step: int, layouts: Sequence[Rows]) -> int:
    """Returns the bytes of the smallest piece of a tensor: one step of rows, as read or with all its components."""
    rows = min(step, layouts[0].rows)
    if not rows:
        return 1
    components = sum(-(-layout.nbytes(0, rows) // ALIGN) * ALIGN for layout in layouts)
    return max(row_bytes * rows, components)


def statistics_bytes(layouts: Sequence[Rows]) -> int:
    """Returns the bytes of the components that every rank holds for all rows until the tensor is finished."""
    return sum(layout.nbytes(0, layout.rows) for layout in layouts if layout.replicated)


def slot_bytes(largest: int) -> int:
    """Returns the bytes of a slot for pieces of up to `largest` bytes: whole pages."""
    return -(-(largest + SLACK) // PAGE) * PAGE


def load_buffer_bytes(staging: int, smallest: int) -> int:
    """Returns the bytes that all slots of a rank take.

    Args:
        staging: the user's budget.
        smallest: bytes of the largest piece that cannot be divided.
    """
    return (READ_SLOTS + SEND_SLOTS) * slot_bytes(max(piece_bytes(staging), smallest))
