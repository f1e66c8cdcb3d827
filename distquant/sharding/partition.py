"""Cuts: where a dim is divided over the ranks of an axis.

A rank's share is a list of segments, because packed projections are cut part by part and kv heads may be repeated.
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
        return self.parts[rank]

    def length(self, rank: int) -> int:
        """Elements of the dim that the rank stores."""
        return sum(stop - start for start, stop in self.parts[rank])

    @property
    def lengths(self) -> list[int]:
        return [self.length(rank) for rank in range(len(self.parts))]

    @property
    def repeated(self) -> int:
        """Elements stored more than once, counted once for each extra copy."""
        return sum(self.lengths) - self.size

    def owned(self, rank: int) -> tuple[tuple[Segment, int], ...]:
        """The rank's segments that nobody before it holds (nor it itself earlier), each with its local start."""
        seen = [segment for earlier in self.parts[:rank] for segment in earlier]
        found, local = [], 0
        for start, stop in self.parts[rank]:
            for left, right in _outside(start, stop, seen):
                found.append(((left, right), local + left - start))
            seen.append((start, stop))
            local += stop - start
        return tuple(found)

    def legal(self, alignment: int) -> bool:
        """Whether every boundary lies on the unit's grid (the end of the dim always does)."""
        edges = {edge for part in self.parts for segment in part for edge in segment}
        return all(edge % alignment == 0 or edge == self.size for edge in edges)

    def scaled(self, factor: int) -> Partition:
        """The same cut of a dim with `factor` elements for each of this one's (heads to rows)."""
        parts = tuple(tuple((a * factor, b * factor) for a, b in part) for part in self.parts)
        return Partition(self.size * factor, parts)


def _outside(start: int, stop: int, seen: list[Segment]) -> list[Segment]:
    """What of `[start, stop)` no segment of `seen` covers."""
    left = [(start, stop)]
    for a, b in seen:
        left = [piece for x, y in left for piece in ((x, min(y, a)), (max(x, b), y)) if piece[0] < piece[1]]
    return left


def even_partition(size: int, alignment: int, ranks: int) -> Partition | None:
    """Divides a dim in whole units as evenly as they allow; the last unit may be ragged. None: fewer units than ranks.

    >>> even_cut(704, 64, 2).lengths
    [384, 320]
    """
    alignments = -(-size // alignment)
    if alignments < ranks:
        return None
    share, extra = divmod(alignments, ranks)
    edges = [0]
    for rank in range(ranks):
        edges.append(min(size, edges[-1] + (share + (rank < extra)) * alignment))
    return Partition(size, tuple(((a, b),) for a, b in pairwise(edges)))


def join_partitions(partitions: list[Partition]) -> Partition:
    """The cut of a packed dim `[part | part | ...]`: each rank holds its share of every part."""
    offsets = [sum(partition.size for partition in partitions[:i]) for i in range(len(partitions))]
    ranks = len(partitions[0].parts)
    parts = tuple(
        tuple(
            (a + at, b + at)
            for partition, at in zip(partitions, offsets, strict=True)
            for a, b in partition.parts[rank]
        )
        for rank in range(ranks)
    )
    return Partition(sum(partition.size for partition in partitions), parts)
