"""Divides staging memory into slots: the same on every rank, because pieces have the same rows everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distquant.loading.stream.tasks import Task
from distquant.planning.slots import READ_SLOTS, SEND_SLOTS, SLACK

SLOT = 8 << 20
"""Bytes of a slot, at most: large enough for a disk and for few messages, small compared with the budget."""

STATISTICS = 8
"""Statistics of tensors that are not finished yet may take one part in this many of the budget."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that pieces and statistics may take.

    Attributes:
        piece: bytes of a piece, as read and as quantized.
        largest: bytes of the largest piece that cannot be divided, where that is more than `piece`; else `piece`.
        statistics: bytes of the statistics of unfinished tensors; those of one tensor are always allowed.
    """

    piece: int
    largest: int
    statistics: int

    @classmethod
    def of(cls, staging: int, tasks: Sequence[Task]) -> Budget:
        """Divides `staging` bytes; exceeds them only where one piece cannot be made small enough."""
        piece = max(min(staging // (READ_SLOTS + SEND_SLOTS) - SLACK, SLOT), 1)
        least = max((_least(task) for task in tasks), default=1)
        return cls(piece, max(piece, least), staging // STATISTICS)

    @property
    def slot(self) -> int:
        """Bytes of a slot, with room to start and end reads past the page cache on page boundaries."""
        return self.largest + SLACK


def _least(task: Task) -> int:
    """Returns the bytes of the smallest piece of a tensor."""
    rows = min(task.step, task.row_layouts[0].rows)
    return max(task.row_bytes * rows, task.payload(0, rows, -1)[1]) if rows else 1
