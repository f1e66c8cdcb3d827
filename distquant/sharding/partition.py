"""Cuts: where a dim is divided over the ranks of an axis.

A rank's share is a list of segments, because packed projections are cut part by part and kv heads may be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

Segment = tuple[int, int]
"""Half-open range `[start, stop)` of a dim, in logical elements."""


@dataclass(frozen=True, slots=True)
class Cut:
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

    def legal(self, unit: int) -> bool:
        """Whether every boundary lies on the unit's grid (the end of the dim always does)."""
        edges = {edge for part in self.parts for segment in part for edge in segment}
        return all(edge % unit == 0 or edge == self.size for edge in edges)

    def scaled(self, factor: int) -> Cut:
        """The same cut of a dim with `factor` elements for each of this one's (heads to rows)."""
        parts = tuple(tuple((a * factor, b * factor) for a, b in part) for part in self.parts)
        return Cut(self.size * factor, parts)


def _outside(start: int, stop: int, seen: list[Segment]) -> list[Segment]:
    """What of `[start, stop)` no segment of `seen` covers."""
    left = [(start, stop)]
    for a, b in seen:
        left = [piece for x, y in left for piece in ((x, min(y, a)), (max(x, b), y)) if piece[0] < piece[1]]
    return left


def even_cut(size: int, unit: int, ranks: int) -> Cut | None:
    """Divides a dim in whole units as evenly as they allow; the last unit may be ragged. None: fewer units than ranks.

    >>> even_cut(704, 64, 2).lengths
    [384, 320]
    """
    units = -(-size // unit)
    if units < ranks:
        return None
    share, extra = divmod(units, ranks)
    edges = [0]
    for rank in range(ranks):
        edges.append(min(size, edges[-1] + (share + (rank < extra)) * unit))
    return Cut(size, tuple(((a, b),) for a, b in pairwise(edges)))


def join_parts(cuts: list[Cut]) -> Cut:
    """The cut of a packed dim `[part | part | ...]`: each rank holds its share of every part."""
    offsets = [sum(cut.size for cut in cuts[:i]) for i in range(len(cuts))]
    ranks = len(cuts[0].parts)
    parts = tuple(
        tuple((a + at, b + at) for cut, at in zip(cuts, offsets, strict=True) for a, b in cut.parts[rank])
        for rank in range(ranks)
    )
    return Cut(sum(cut.size for cut in cuts), parts)
