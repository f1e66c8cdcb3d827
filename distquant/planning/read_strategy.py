"""Ways in which the ranks of a node read a tensor: each its own rows, shared rows in turns, or whole rows for all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition

OWN, SHARED, SCATTER = "own", "dealt", "scatter"

REASONS = {
    OWN: "read as own slices: each rank keeps whole rows, and reads only these",
    SHARED: "read in shares: several ranks of a node keep the same rows; each reads a part and sends it to the others",
    SCATTER: "read, quantized and scattered: columns are sharded; one rank reads whole rows and sends the columns",
}
"""Why a tensor is read as it is, by the name of the strategy (`TensorPlan.reading`)."""


def read_strategy(
    dim: int | None, partition: Partition | None, mesh: Mesh, nodes: Sequence[int], expert: bool = False
) -> str:
    """Returns the strategy of a tensor, a key of `REASONS`.

    Args:
        dim: dim that is sharded.
        partition: its partition.
        mesh: of the plan.
        nodes: node of each rank.
        expert: True for an expert, which is stored on one position of ep only.
    """
    if dim not in (None, 0) and partition is not None:
        return SCATTER
    shared = any(_share_rows(partition, positions) for positions in _positions(mesh, tuple(nodes), expert))
    return SHARED if shared else OWN


@cache
def _positions(mesh: Mesh, nodes: tuple[int, ...], expert: bool) -> frozenset[tuple[int, ...]]:
    """Returns the positions on tp of each node's ranks; for an expert, of each node's ranks at one position of ep."""
    found: dict[tuple[int, int], list[int]] = {}
    for rank, node in enumerate(nodes):
        coordinates = mesh.coordinates(rank)
        found.setdefault((node, coordinates["ep"] if expert else 0), []).append(coordinates["tp"])
    return frozenset(map(tuple, found.values()))


def _share_rows(partition: Partition | None, positions: tuple[int, ...]) -> bool:
    """Returns True if two ranks of a node keep some of the same rows."""
    if partition is None or len(set(positions)) < len(positions):
        return len(positions) > 1
    if not partition.repeated:
        return False
    kept = [(segment, tp) for tp in positions for segment in partition.segments(tp)]
    return any(tp != other and a < d and c < b for (a, b), tp in kept for (c, d), other in kept)
