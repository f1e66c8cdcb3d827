"""One rank's part of a weight, in logical terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from distquant.old_names import OldFields
from distquant.sharding.partition import Partition, Segment


@dataclass(frozen=True, slots=True)
class Shard(OldFields):
    """One rank's part of a linear weight.

    Attributes:
        name: path of the parameter.
        shape: logical `[out, in]` of the whole.
        dtype: torch's name of the dtype that is quantized from.
        shard_dim: the dim that is partitioned; None = the rank holds everything.
        partition: of that dim over the axis.
        rank: position on the axis.
    """

    old_fields: ClassVar[Mapping[str, str]] = {"dim": "shard_dim", "cut": "partition"}

    name: str
    shape: tuple[int, int]
    dtype: str
    shard_dim: int | None = None
    partition: Partition | None = None
    rank: int = 0

    @property
    def rows(self) -> tuple[Segment, ...]:
        """Segments of `out` that are held, in local order."""
        return self.partition.segments(self.rank) if self.shard_dim == 0 and self.partition else ((0, self.shape[0]),)

    @property
    def columns(self) -> tuple[Segment, ...]:
        """Segments of `in` that are held, in local order."""
        return self.partition.segments(self.rank) if self.shard_dim == 1 and self.partition else ((0, self.shape[1]),)

    @property
    def owned(self) -> tuple[tuple[Segment, int], ...]:
        """Segments of the shard dim that this rank is the first to hold, each with its local start.

        Replicated weights are owned by rank 0 of the axis.
        """
        if self.partition is None:
            return (((0, self.shape[0]), 0),) if self.rank == 0 else ()
        return self.partition.owned(self.rank)

    @property
    def local_shape(self) -> tuple[int, int]:
        """Logical `[out, in]` of this rank's part."""
        return sum(b - a for a, b in self.rows), sum(b - a for a, b in self.columns)
