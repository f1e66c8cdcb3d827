"""Partitions: where a dim is divided over the ranks of an axis.

A rank's share is a list of segments, because packed projections are partitioned part by part, and kv heads may be
repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

Segment = tuple[int, int]
"""Half-open range `[start, stop)` of a dim, in logical elements."""


@dataclass(frozen=True, slots=True)
class Partition:
    """The segments of a dim that each rank holds, in the order in which it stores them.

    Segments of different ranks may overlap (repeated kv heads): such elements count for their first holder.
    """

    size: int
    parts: tuple[tuple[Segment, ...], ...]

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Returns the segments of a rank, in local order."""
        return self.parts[rank]

    def length(self, rank: int) -> int:
        """Returns how many elements of the dim a rank stores."""
        return sum(stop - start for start, stop in self.parts[rank])

    @property
    def lengths(self) -> list[int]:
        """Elements that each rank stores."""
        return [self.length(rank) for rank in range(len(self.parts))]

    @property
    def repeated(self) -> int:
        """Elements stored more than once, counted once for each extra copy."""
        return sum(self.lengths) - self.size

    def owned(self, rank: int) -> tuple[tuple[Segment, int], ...]:
        """Returns the segments that this rank is the first to hold, each with its local start.

        Each element of the dim has exactly one owner, and so counts once, however often it is stored.
        """
        earlier = [segment for part in self.parts[:rank] for segment in part]
        owned, local = [], 0
        for start, stop in self.parts[rank]:
            for left, right in _outside(start, stop, earlier):
                owned.append(((left, right), local + left - start))
            # A rank may store an element twice itself (a kv head for two query heads): the first copy counts.
            earlier.append((start, stop))
            local += stop - start
        return tuple(owned)

    def legal(self, alignment: int) -> bool:
        """Returns True if every boundary is a multiple of the alignment, or the end of the dim."""
        edges = {edge for part in self.parts for segment in part for edge in segment}
        return all(edge % alignment == 0 or edge == self.size for edge in edges)

    def scaled(self, factor: int) -> Partition:
        """Returns the same partition of a dim with `factor` elements for each of this one's (heads to rows)."""
        parts = tuple(tuple((a * factor, b * factor) for a, b in part) for part in self.parts)
        return Partition(self.size * factor, parts)


def _outside(start: int, stop: int, covered: list[Segment]) -> list[Segment]:
    """Returns the parts of `[start, stop)` that no segment of `covered` covers."""
    left = [(start, stop)]
    for a, b in covered:
        left = [piece for x, y in left for piece in ((x, min(y, a)), (max(x, b), y)) if piece[0] < piece[1]]
    return left


def even_partition(size: int, alignment: int, ranks: int) -> Partition | None:
    """Divides a dim at multiples of an alignment, as evenly as it allows; the last block of a dim may be shorter.

    Returns:
        The partition; None where there are fewer blocks than ranks.

    >>> even_partition(704, 64, 2).lengths
    [384, 320]
    """
    blocks = -(-size // alignment)
    if blocks < ranks:
        return None
    share, extra = divmod(blocks, ranks)
    edges = [0]
    for rank in range(ranks):
        edges.append(min(size, edges[-1] + (share + (rank < extra)) * alignment))
    return Partition(size, tuple(((a, b),) for a, b in pairwise(edges)))


def join_partitions(partitions: list[Partition]) -> Partition:
    """Returns the partition of a packed dim `[part | part | ...]`: each rank holds its share of every part."""
    offsets = [sum(partition.size for partition in partitions[:i]) for i in range(len(partitions))]
    ranks = len(partitions[0].parts)
    parts = tuple(
        tuple(
            (a + offset, b + offset)
            for partition, offset in zip(partitions, offsets, strict=True)
            for a, b in partition.parts[rank]
        )
        for rank in range(ranks)
    )
    return Partition(sum(partition.size for partition in partitions), parts)
