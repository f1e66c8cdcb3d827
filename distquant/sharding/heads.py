"""Partitions attention heads: query heads, and the kv heads that they attend with.

With at least as many kv heads as ranks, each kv head goes to one rank, and its query heads with it. With fewer, query
heads are distributed, and each rank holds the kv heads that its own need. Where the rank's map of query to kv heads is
not uniform, the kv rows are repeated, once for each query head. A kv head on several ranks counts once in the
fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distquant.sharding.partition import Partition, even_partition


@dataclass(frozen=True, slots=True)
class HeadPartition:
    """Heads per rank.

    Attributes:
        query: partition of the query heads.
        kv: partition of the kv heads; repeats are listed as often as they are stored.
        groups: query heads per stored kv head, per rank (`num_key_value_groups`).
    """

    query: Partition
    kv: Partition
    groups: tuple[int, ...]

    def describe(self, rank: int) -> str:
        """Describes one rank's heads in words."""
        kv = [head for a, b in self.kv.segments(rank) for head in range(a, b)]
        (first, last) = self.query.segments(rank)[0]
        each = f", {self.groups[rank]} query heads to each kv head"
        return f"query heads {first}-{last - 1}, kv heads {','.join(map(str, kv))}{each}"


def head_partitions(heads: int, kv_heads: int, ranks: int) -> Iterator[HeadPartition]:
    """Yields all partitions of the heads, best first: each kv head on one rank, then repeats; small steps first."""
    groups = heads // kv_heads
    for step in range(1, kv_heads // ranks + 1 if ranks <= kv_heads else 0):
        kv = even_partition(kv_heads, step, ranks)
        if kv is not None:
            yield HeadPartition(kv.scaled(groups), kv, (groups,) * ranks)
    for step in range(1, heads // ranks + 1 if ranks <= heads else 0):
        query = even_partition(heads, step, ranks)
        if query is not None and ranks > 1:
            yield _by_query(query, kv_heads, groups)


def _by_query(query: Partition, kv_heads: int, groups: int) -> HeadPartition:
    """Returns the partition in which each rank holds the kv heads that its query heads need."""
    parts, local_groups = [], []
    for rank in range(len(query.parts)):
        ((first, last),) = query.segments(rank)
        needed = [head // groups for head in range(first, last)]
        distinct = sorted(set(needed))
        # Attention repeats every local kv head equally often (`num_key_value_groups`). Where this rank's query heads
        # do not share them equally, each query head gets a kv head of its own.
        if len({needed.count(head) for head in distinct}) == 1:
            parts.append(tuple((head, head + 1) for head in distinct))
            local_groups.append(len(needed) // len(distinct))
        else:
            parts.append(tuple((head, head + 1) for head in needed))
            local_groups.append(1)
    return HeadPartition(query, Partition(kv_heads, tuple(parts)), tuple(local_groups))
