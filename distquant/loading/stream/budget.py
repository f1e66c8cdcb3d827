"""How staging memory is divided into slots; the same on every rank, because pieces have the same rows everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distquant.loading.stream.tasks import Task
from distquant.planning.slots import READ_SLOTS, SEND_SLOTS, SLACK

SLOT = 8 << 20
"""Bytes of a slot where the budget allows: large enough for a disk and for few messages, small beside the budget."""

STATISTICS = 8
"""This part of the budget may be taken by statistics of tensors that are not finished yet."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that pieces and statistics may take.

    Attributes:
        piece: bytes of a piece, as read and as quantized.
        largest: bytes of the largest piece that cannot be divided, where the budget is too small for it; else `piece`.
        statistics: bytes of statistics that may be held back for unfinished tensors (always those of one).
    """

    piece: int
    largest: int
    statistics: int

    @classmethod
    def of(cls, staging: int, tasks: Sequence[Task]) -> Budget:
        piece = max(min(staging // (READ_SLOTS + SEND_SLOTS) - SLACK, SLOT), 1)
        least = max((_least(task) for task in tasks), default=1)
        return cls(piece, max(piece, least), staging // STATISTICS)

    @property
    def slot(self) -> int:
        """Bytes of a slot: reads past the page cache start and end on pages."""
        return self.largest + SLACK


def _least(task: Task) -> int:
    """Bytes of the smallest piece of a tensor."""
    rows = min(task.step, task.row_layouts[0].rows)
    return max(task.row_bytes * rows, task.payload(0, rows, -1)[1]) if rows else 1
