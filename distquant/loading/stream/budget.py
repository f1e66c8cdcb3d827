"""Divides staging memory into slots: the same on every rank, because pieces have the same rows everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distquant.loading.stream.tasks import Task
from distquant.planning.slots import STATISTICS, piece_bytes, slot_bytes, smallest_piece


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
        piece = piece_bytes(staging)
        # Experts by the thousand are of one kind, and have equal pieces.
        kinds = {(task.transfer.kind, task.columns): task for task in tasks}.values()
        least = max((smallest_piece(task.row_bytes, task.step, task.row_layouts) for task in kinds), default=1)
        return cls(piece, max(piece, least), staging // STATISTICS)

    @property
    def slot(self) -> int:
        """Bytes of a slot, with room to start and end reads past the page cache on page boundaries."""
        return slot_bytes(self.largest)
