"""Assigns the rows of every transfer to the ranks of a node, so that a node reads each byte once.

A rank reads rows that it alone keeps. Rows that several ranks keep (replicas, repeated kv heads, replicated tensors)
are divided over those. Rows whose columns are sharded are divided over all ranks that keep a part of them: one rank
reads and quantizes whole rows, and sends the others what they keep. The plan sums the bytes of the reads that a load
makes. Pure arithmetic, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

from distquant.planning.row_map import row_segments, rows_and_width
from distquant.planning.transfers import Transfer, TransferKind
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import Partition, Segment

SHARE = 1 << 20
"""Bytes for each owner below which rows are not divided: one rank reads all of them."""

Run = tuple[Segment, tuple[int, ...]]
"""Consecutive rows that the same ranks keep, and these ranks."""


@dataclass(frozen=True, slots=True)
class ReadItem:
    """Consecutive rows that one rank reads for all ranks of its node that keep something of them.

    Attributes:
        reader: rank that reads them.
        rows: of the transfer.
        owners: ranks of the node that keep something of them.
        nbytes: bytes that are read.
    """

    reader: int
    rows: Segment
    owners: tuple[int, ...]
    nbytes: int = 0


class NodeReads(NamedTuple):
    """The reads of one node for a transfer.

    Attributes:
        transfer: the transfer.
        owners: ranks of the node that keep something of it.
        columns: logical columns that the node reads of every row.
        reads: which rank reads which rows, in row order.
    """

    transfer: Transfer
    owners: tuple[int, ...]
    columns: Segment
    reads: tuple[ReadItem, ...]


def nodes_of(world: int, per_node: int | None) -> tuple[int, ...]:
    """Returns the node of each rank where ranks fill nodes in order; without a number, 8 ranks share one."""
    return tuple(rank // (per_node or 8) for rank in range(world))


def node_ranks(nodes: Sequence[int], rank: int) -> tuple[int, ...]:
    """Returns the ranks on a rank's node, itself included."""
    return tuple(other for other, node in enumerate(nodes) if node == nodes[rank])


def reads_of_node(transfers: Iterable[Transfer], mesh: Mesh, node: tuple[int, ...]) -> Iterator[NodeReads]:
    """Yields how a node reads each transfer that its ranks keep something of; plan and load both work from this.

    Args:
        transfers: in the order of loading. Experts that other nodes keep are left out.
        mesh: of the plan.
        node: ranks of the node.
    """
    return ReadAssigner(mesh, node).reads_of(transfers)


def bytes_read(
    transfers: Iterable[Transfer],
    mesh: Mesh,
    nodes: Sequence[int],
    observe: Callable[[list[NodeReads]], None] | None = None,
) -> list[int]:
    """Returns the bytes that each rank reads.

    Nodes with the same positions that read transfers of the same kinds read the same bytes, so they are summed once:
    of 32 nodes that hold 8 experts each, one.

    Args:
        transfers: of the whole plan, in the order of loading.
        mesh: of the plan.
        nodes: node of each rank.
        observe: called with what a node reads, once for nodes that read the same.
    """
    by_ep: dict[int | None, list[tuple[int, Transfer]]] = {None: []}
    for index, transfer in enumerate(transfers):
        by_ep.setdefault(transfer.ep, []).append((index, transfer))
    read = [0] * mesh.size
    known: dict[Any, list[int]] = {}
    for node in dict.fromkeys(node_ranks(nodes, rank) for rank in range(mesh.size)):
        eps = tuple(_ranks_by_ep(mesh, node))
        places = tuple((each["tp"], eps.index(each["ep"])) for each in map(mesh.coordinates, node))
        if (places, eps) not in known:
            here: list[tuple[int, int | None, Transfer]] = [(index, None, each) for index, each in by_ep[None]]
            for number, ep in enumerate(eps):
                here += [(index, number, each) for index, each in by_ep.get(ep, ())]
            here.sort(key=itemgetter(0))
            work = tuple((number, transfer.kind) for _, number, transfer in here)
            if (places, work) not in known:
                assigner = ReadAssigner(mesh, node)
                assignments = list(assigner.reads_of(transfer for *_, transfer in here))
                if observe is not None:
                    observe(assignments)
                known[places, work] = list(assigner.loads.values())
            known[places, eps] = known[places, work]
        for rank, nbytes in zip(node, known[places, eps], strict=True):
            read[rank] = nbytes
    return read


def _ranks_by_ep(mesh: Mesh, node: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Returns the ranks of a node at each position on ep that it has."""
    by_ep: dict[int, tuple[int, ...]] = {}
    for rank in node:
        ep = mesh.coordinates(rank)["ep"]
        by_ep[ep] = (*by_ep.get(ep, ()), rank)
    return by_ep


def node_columns(
    shape: Sequence[int], dim: int | None, partition: Partition | None, positions: Iterable[int], step: int | None
) -> Segment:
    """Returns the columns that a node reads of every row.

    Args:
        shape: of the tensor.
        dim: dim that is sharded.
        partition: its partition.
        positions: on tp, of the node's ranks.
        step: multiples of columns that can be quantized without the rest of their row; None = whole rows only.
    """
    width = rows_and_width(shape)[1]
    if dim in (None, 0) or partition is None or step is None:
        return (0, width)
    wanted = [segment for tp in positions for segment in partition.segments(tp)]
    start, stop = min(a for a, _ in wanted), max(b for _, b in wanted)
    # One run of columns, even where the ranks leave some out between them: a read is cheaper than two.
    return (start, stop) if start % step == 0 and (stop % step == 0 or stop == width) else (0, width)


@dataclass(frozen=True, slots=True)
class _RunReads:
    """The reads of consecutive rows, as far as transfers of a kind have them in common.

    Attributes:
        items: the reads, in row order; or, with `choice`, the same rows once for each rank that may read them.
        choice: True if one rank reads all of the rows: whoever has read least so far.
    """

    items: tuple[ReadItem, ...]
    choice: bool


class ReadAssigner:
    """Assigns the rows of transfers, one after the other, to the ranks of one node.

    There may be tens of thousands of transfers of few kinds, so what transfers of a kind have in common is kept.

    Args:
        mesh: of the plan.
        node: ranks of the node.

    Attributes:
        loads: bytes that each rank has been assigned so far.
    """

    def __init__(self, mesh: Mesh, node: tuple[int, ...]):
        self.node = node
        self.positions: Mapping[int, int] = {rank: mesh.coordinates(rank)["tp"] for rank in node}
        self.loads = dict.fromkeys(node, 0)
        self._by_ep = _ranks_by_ep(mesh, node)
        self._runs: dict[tuple[int, Partition, tuple[int, ...]], list[Run]] = {}
        self._kinds: dict[tuple[TransferKind, tuple[int, ...]], tuple[Segment, tuple[_RunReads, ...]]] = {}

    def reads_of(self, transfers: Iterable[Transfer]) -> Iterator[NodeReads]:
        """Yields the reads of each transfer that a rank of the node keeps something of."""
        for transfer in transfers:
            owners = self.node if transfer.ep is None else self._by_ep.get(transfer.ep)
            if owners:
                yield NodeReads(transfer, owners, *self.assign_reads(transfer.kind, owners))

    def assign_reads(
        self, kind: TransferKind, owners: tuple[int, ...] | None = None
    ) -> tuple[Segment, tuple[ReadItem, ...]]:
        """Returns the columns that the node reads, and its reads in row order.

        Every row that the node keeps is in exactly one read.

        Args:
            kind: of the transfer.
            owners: ranks of the node that keep something of it; None = all.
        """
        owners = self.node if owners is None else owners
        known = self._kinds.get((kind, owners))
        if known is None:
            known = self._kinds[kind, owners] = self._reads_of_kind(kind, owners)
        columns, runs = known
        loads, reads = self.loads, tuple[ReadItem, ...]()
        for run in runs:
            items = run.items
            if run.choice:
                # The first of several that have read as little, so that every rank of the node comes to the same
                # answer without asking.
                items = (min(items, key=lambda item: (loads[item.reader], item.reader)),)
            for item in items:
                loads[item.reader] += item.nbytes
            reads = items if len(runs) == 1 else (*reads, *items)
        return columns, reads

    def _reads_of_kind(self, kind: TransferKind, owners: tuple[int, ...]) -> tuple[Segment, tuple[_RunReads, ...]]:
        """Returns the columns that the node reads of transfers of a kind, and their reads by runs of rows."""
        positions = [self.positions[rank] for rank in owners]
        columns = node_columns(kind.shape, kind.shard_dim, kind.partition, positions, kind.column_step)
        runs = self._runs_of(kind, owners)
        found: list[_RunReads] = []
        for rows, keeping in runs:
            run = _share(kind, rows, columns, keeping)
            if found and not (run.choice or found[-1].choice):
                run = _RunReads(found.pop().items + run.items, choice=False)
            found.append(run)
        return columns, tuple(found)

    def _runs_of(self, kind: TransferKind, owners: tuple[int, ...]) -> list[Run]:
        """Returns the runs of rows that the same ranks keep."""
        rows, _ = rows_and_width(kind.shape)
        if kind.shard_dim != 0 or kind.partition is None or kind.single_reader:
            return [((0, rows), owners)] if rows else []
        key = (rows, kind.partition, owners)  # layers are alike
        if key not in self._runs:
            self._runs[key] = self._split_at_edges(kind, owners)
        return self._runs[key]

    def _split_at_edges(self, kind: TransferKind, owners: tuple[int, ...]) -> list[Run]:
        wanted = {rank: row_segments(kind.shape, 0, kind.partition, self.positions[rank]) for rank in owners}
        # Between two neighbouring edges of any rank's segments, every row has the same owners.
        edges = sorted({edge for segments in wanted.values() for segment in segments for edge in segment})
        runs = []
        for start, stop in pairwise(edges):
            keeping = tuple(r for r, segments in wanted.items() if any(a <= start and stop <= b for a, b in segments))
            if keeping:
                runs.append(((start, stop), keeping))
        return runs


def _share(kind: TransferKind, rows: Segment, columns: Segment, owners: tuple[int, ...]) -> _RunReads:
    """Returns the reads of a run of rows: by one of its owners, or a share by each."""
    start, stop = rows
    count, total = len(owners), kind.nbytes(rows, columns)
    if count == 1 or kind.single_reader or total < SHARE * count:
        # A small run is not worth a message to each owner.
        return _RunReads(tuple(ReadItem(reader, rows, owners, total) for reader in owners), choice=count > 1)
    # Equal shares, rounded down to whole steps from the start of the run, because rows of one step are quantized
    # together. The last owner gets what the rounding leaves. A share may be empty: then its owner reads nothing.
    step = kind.row_step
    edges = [start + (stop - start) * i // count // step * step for i in range(count)] + [stop]
    shares = ((reader, part) for reader, part in zip(owners, pairwise(edges), strict=True) if part[0] < part[1])
    items = (ReadItem(reader, part, owners, kind.nbytes(part, columns)) for reader, part in shares)
    return _RunReads(tuple(items), choice=False)
