"""Who reads what: the rows of every tensor are dealt out over the ranks of a node, so that each byte is read once.

Rows that one rank alone keeps are read by it. Rows that several ranks keep (replicas, repeated kv heads, whole
tensors) are dealt out over those, and rows that are cut along their columns over all that keep a part of them: one
rank reads and quantizes them whole, and hands the others what they keep. Pure arithmetic, the same on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition, Segment

OWN, DEALT, SCATTER = "own", "dealt", "scatter"

REASONS = {
    OWN: "read as own slices: a rank keeps whole rows, and reads just these",
    DEALT: "dealt out: several ranks of a node keep the same rows; each reads a share and hands it on",
    SCATTER: "read, quantized and scattered: rows are cut across; one rank reads them whole and hands out the columns",
}
"""Why a tensor is read the way it is, by the name of the way (`TensorPlan.reading`)."""

SHARE = 1 << 20
"""Bytes of a tensor under which it is not dealt out: one rank reads all of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a tensor that one rank reads for all ranks of its node that keep something of them."""

    reader: int
    rows: Segment
    owners: tuple[int, ...]


def rows_and_width(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor as rows: all dims but the last, times the last (a 1-D tensor has rows of one element)."""
    width = shape[-1] if len(shape) > 1 else 1
    return (math.prod(shape) // width if width else 0), width


def nodes_of(world: int, per_node: int | None) -> tuple[int, ...]:
    """The node of each rank where ranks fill nodes in order; without a number, 8 ranks share one."""
    return tuple(rank // (per_node or 8) for rank in range(world))


def node_ranks(nodes: Sequence[int], rank: int) -> tuple[int, ...]:
    """The ranks on a rank's node, itself included."""
    return tuple(other for other, node in enumerate(nodes) if node == nodes[rank])


def row_segments(shape: Sequence[int], dim: int | None, partition: Partition | None, tp: int) -> tuple[Segment, ...]:
    """Rows that a position on tp keeps (something of), in local order."""
    rows = rows_and_width(shape)[0]
    if dim != 0 or partition is None or not shape:
        return ((0, rows),)
    per = rows // shape[0] if shape[0] else 0
    return tuple((a * per, b * per) for a, b in partition.segments(tp))


def column_segments(shape: Sequence[int], dim: int | None, partition: Partition | None, tp: int) -> tuple[Segment, ...]:
    """Columns that a position on tp keeps of its rows, in local order."""
    width = rows_and_width(shape)[1]
    return partition.segments(tp) if dim not in (None, 0) and partition is not None else ((0, width),)


def way_of_reading(
    dim: int | None, partition: Partition | None, mesh: Mesh, nodes: Sequence[int], expert: bool = False
) -> str:
    """The way in which a tensor is read (a key of `REASONS`); `expert` marks one that lies on one position of ep."""
    if dim not in (None, 0) and partition is not None:
        return SCATTER
    shared = any(_share_rows(partition, positions) for positions in _positions(mesh, tuple(nodes), expert))
    return DEALT if shared else OWN


@cache
def _positions(mesh: Mesh, nodes: tuple[int, ...], expert: bool) -> frozenset[tuple[int, ...]]:
    """The positions on tp of each node's ranks; of those apart that hold other experts, for an `expert`."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank, node in enumerate(nodes):
        at = mesh.coordinates(rank)
        found.setdefault((node, at["ep"] if expert else 0), []).append(at["tp"])
    return frozenset(map(tuple, found.values()))


def _share_rows(partition: Partition | None, positions: tuple[int, ...]) -> bool:
    """Whether two ranks of a node keep some rows both."""
    if partition is None or len(set(positions)) < len(positions):
        return len(positions) > 1
    if not partition.repeated:
        return False
    held = [(segment, tp) for tp in positions for segment in partition.segments(tp)]
    return any(tp != other and a < d and c < b for (a, b), tp in held for (c, d), other in held)


def node_columns(
    shape: Sequence[int], dim: int | None, partition: Partition | None, positions: Iterable[int], step: int | None
) -> Segment:
    """Columns that a node reads of every row.

    Args:
        shape: of the tensor.
        dim: dim that is cut.
        cut: its cut.
        positions: on tp, of the node's ranks.
        step: columns at which rows may be quantized apart; None = whole rows only.
    """
    width = rows_and_width(shape)[1]
    if dim in (None, 0) or partition is None or step is None:
        return (0, width)
    wanted = [segment for tp in positions for segment in partition.segments(tp)]
    start, stop = min(a for a, _ in wanted), max(b for _, b in wanted)
    return (start, stop) if start % step == 0 and (stop % step == 0 or stop == width) else (0, width)


class ReadAssigner:
    """Deals the rows of tensors, one tensor after the other, over the ranks of one node."""

    def __init__(self, mesh: Mesh, node: tuple[int, ...]):
        self.node = node
        self.positions: Mapping[int, int] = {rank: mesh.coordinates(rank)["tp"] for rank in node}
        self.loads = dict.fromkeys(node, 0)
        """Bytes that each rank has been dealt so far."""
        self._runs: dict[tuple[int, Partition, tuple[int, ...]], list[tuple[Segment, tuple[int, ...]]]] = {}

    def assign_reads(
        self,
        shape: Sequence[int],
        dim: int | None,
        partition: Partition | None,
        row_bytes: int,
        step: int,
        whole: bool = False,
        owners: tuple[int, ...] | None = None,
    ) -> list[Part]:
        """The parts of a tensor, in row order; every row that the node keeps is in exactly one.

        Args:
            shape: of the tensor.
            dim: dim that is cut.
            cut: its cut.
            row_bytes: bytes that are read of a row.
            step: rows that are quantized together; parts start at a multiple of it.
            whole: whether one rank must read all of it (it is turned, or quantized as a whole).
            keepers: ranks of the node that keep something of it; None = all.
        """
        among = self.node if owners is None else owners
        if whole:
            rows = rows_and_width(shape)[0]
            return self._share(0, rows, among, row_bytes, step, whole) if rows else []
        parts: list[Part] = []
        for (start, stop), owners in self._held(shape, dim, partition, among):
            parts += self._share(start, stop, owners, row_bytes, step, whole)
        return parts

    def _held(
        self, shape: Sequence[int], dim: int | None, partition: Partition | None, among: tuple[int, ...]
    ) -> list[tuple[Segment, tuple[int, ...]]]:
        """Runs of rows that the same ranks keep."""
        rows, _ = rows_and_width(shape)
        if dim != 0 or partition is None:
            return [((0, rows), among)] if rows else []
        key = (rows, partition, among)
        if key not in self._runs:
            self._runs[key] = self._runs_of(shape, partition, among)
        return self._runs[key]

    def _runs_of(
        self, shape: Sequence[int], partition: Partition, among: tuple[int, ...]
    ) -> list[tuple[Segment, tuple[int, ...]]]:
        wanted = {rank: row_segments(shape, 0, partition, self.positions[rank]) for rank in among}
        edges = sorted({edge for segments in wanted.values() for segment in segments for edge in segment})
        runs = []
        for start, stop in pairwise(edges):
            owners = tuple(r for r, segments in wanted.items() if any(a <= start and stop <= b for a, b in segments))
            if owners:
                runs.append(((start, stop), owners))
        return runs

    def _share(
        self, start: int, stop: int, owners: tuple[int, ...], row_bytes: int, step: int, whole: bool
    ) -> list[Part]:
        count = len(owners)
        if count == 1 or whole or (stop - start) * row_bytes < SHARE * count:
            reader = min(owners, key=lambda rank: (self.loads[rank], rank))
            self.loads[reader] += (stop - start) * row_bytes
            return [Part(reader, (start, stop), owners)]
        edges = [start + (stop - start) * i // count // step * step for i in range(count)] + [stop]
        parts = [Part(rank, (a, b), owners) for rank, (a, b) in zip(owners, pairwise(edges), strict=True) if a < b]
        for part in parts:
            self.loads[part.reader] += (part.rows[1] - part.rows[0]) * row_bytes
        return parts
