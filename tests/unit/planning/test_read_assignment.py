"""Who reads what, against brute force over rows: each row that a node keeps is read once, by a rank that keeps it."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distquant.planning import Partition, even_partition
from distquant.planning.read_assignment import SHARE, ReadAssigner, ReadItem, node_columns, node_ranks, nodes_of
from distquant.planning.read_strategy import OWN, REASONS, SCATTER, SHARED, read_strategy
from distquant.planning.row_map import column_segments, row_segments, rows_and_width
from distquant.planning.transfers import TransferKind
from distquant.sharding.mesh import Mesh
from distquant.sharding.partition import join_partitions

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)

meshes = st.builds(
    lambda dp, ep, tp: Mesh(dp=dp, ep=ep, tp=tp), st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)
)
steps = st.sampled_from([1, 2, 3, 4, 16])
row_sizes = st.sampled_from([1, 6, 512, SHARE // 8, SHARE, 3 * SHARE + 2])


@st.composite
def partitions(draw, size: int, tp: int) -> Partition | None:
    """An even cut, a packed one, or one in which ranks repeat what others (or they themselves) hold."""
    kind = draw(st.sampled_from(["none", "even", "packed", "repeated"]))
    if kind == "even":
        return even_partition(size, draw(st.sampled_from([1, 2, 4])), tp)
    if kind == "packed" and size >= 2 * tp:
        first = draw(st.integers(tp, size - tp))
        return join_partitions(
            [
                partition
                for partition in (even_partition(first, 1, tp), even_partition(size - first, 1, tp))
                if partition
            ]
        )
    if kind == "repeated":
        heads = draw(st.integers(1, min(size, 4)))
        if size % heads == 0:
            each = [draw(st.lists(st.integers(0, heads - 1), min_size=1, max_size=3)) for _ in range(tp)]
            return Partition(heads, tuple(tuple((h, h + 1) for h in sorted(held)) for held in each)).scaled(
                size // heads
            )
    return None


@st.composite
def tensors(draw, tp: int):
    """(shape, dim, cut)."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    if draw(st.booleans()):
        shape = (shape[0] * 16, *shape[1:])
    dim = draw(st.sampled_from([None, 0, len(shape) - 1]))
    partition = draw(partitions(shape[dim], tp)) if dim is not None else None
    return shape, dim if partition is not None else None, partition


def assign(
    assigner: ReadAssigner, shape, dim, partition, row_bytes: int, step: int, whole: bool = False
) -> list[ReadItem]:
    """The reads of rows of which each takes so many bytes."""
    kind = TransferKind(
        component=None,
        shape=shape,
        dtype=None,
        shard_dim=dim,
        partition=partition,
        components=(),
        row_step=step,
        column_step=None,
        single_reader=whole,
        row_bytes=((rows_and_width(shape)[0], row_bytes),),
    )
    return assigner.assign_reads(kind)[1]


def kept(shape, dim, partition, tp) -> set[int]:
    """Rows that a position on tp keeps something of, one by one."""
    rows, _ = rows_and_width(shape)
    if dim != 0 or partition is None:
        return set(range(rows))
    per = rows // shape[0]
    return {row for a, b in partition.segments(tp) for row in range(a * per, b * per)}


def random_node(draw, mesh: Mesh) -> tuple[int, ...]:
    nodes = nodes_of(mesh.size, draw(st.integers(1, mesh.size + 1)))
    return node_ranks(nodes, draw(st.integers(0, mesh.size - 1)))


@PROPERTY
@given(meshes, st.data())
def test_every_row_is_in_one_part(mesh, data):
    node = random_node(data.draw, mesh)
    assigner = ReadAssigner(mesh, node)
    total = 0
    for _ in range(data.draw(st.integers(1, 4))):
        shape, dim, partition = data.draw(tensors(mesh.tp))
        row_bytes, step, whole = data.draw(row_sizes), data.draw(steps), data.draw(st.booleans())
        owners = {rank: kept(shape, dim, partition, mesh.coordinates(rank)["tp"]) for rank in node}
        read: dict[int, int] = {}
        parts = assign(assigner, shape, dim, partition, row_bytes, step, whole)
        if whole:  # one rank reads all, and all get what it makes of it
            owners = {rank: set(range(rows_and_width(shape)[0])) for rank in node}
            assert len(parts) <= 1
        assert [part.rows for part in parts] == sorted(part.rows for part in parts)
        for part in parts:
            start, stop = part.rows
            assert start < stop
            assert part.reader in part.owners
            assert part.nbytes == (stop - start) * row_bytes
            for row in range(start, stop):
                assert row not in read, f"row {row} is read by {read[row]} and {part.reader}"
                read[row] = part.reader
                assert part.owners == tuple(rank for rank in node if row in owners[rank])
        assert set(read) == set().union(*owners.values())
        total += len(read) * row_bytes
    assert sum(assigner.loads.values()) == total


@PROPERTY
@given(meshes, st.data())
def test_parts_start_on_steps(mesh, data):
    """Of a run of rows with the same owners, so where a run starts on a step, all its parts do.

    A run ends at every boundary of the partition, also where the same ranks keep the rows behind it.
    """
    node = random_node(data.draw, mesh)
    shape, dim, partition = data.draw(tensors(mesh.tp))
    step = data.draw(steps)
    segments = [
        segment for rank in node for segment in row_segments(shape, dim, partition, mesh.coordinates(rank)["tp"])
    ]
    edges = {edge for segment in segments for edge in segment}
    runs: dict[int, tuple[int, ...]] = {}
    end = None
    for part in assign(ReadAssigner(mesh, node), shape, dim, partition, SHARE, step):
        start, stop = part.rows
        if start != end or start in edges or runs[max(runs)] != part.owners:
            runs[start] = part.owners
        assert (start - max(runs)) % step == 0
        end = stop


@PROPERTY
@given(meshes, steps, st.data())
def test_one_rank_reads_what_must_be_read_whole(mesh, step, data):
    node = random_node(data.draw, mesh)
    shape = (data.draw(st.integers(1, 64)), data.draw(st.integers(1, 9)))
    partition = data.draw(partitions(shape[1], mesh.tp))
    parts = assign(ReadAssigner(mesh, node), shape, 1 if partition else None, partition, 3 * SHARE, step, whole=True)
    assert [(part.rows, part.owners) for part in parts] == [((0, shape[0]), node)]


@PROPERTY
@given(meshes, st.lists(st.tuples(st.integers(1, 400), row_sizes, steps, st.booleans()), min_size=1, max_size=12))
def test_ranks_read_about_the_same(mesh, sizes):
    """What all keep: no rank reads more than its share, the largest tensor that is not divided, and ragged steps."""
    node = tuple(range(mesh.size))
    assigner = ReadAssigner(mesh, node)
    whole = ragged = 0
    for rows, row_bytes, step, transposed in sizes:
        parts = assign(assigner, (rows, 7), None, None, row_bytes, step, transposed)
        if len(parts) > 1:
            ragged += step * row_bytes
        else:
            whole = max(whole, rows * row_bytes)
    share = sum(rows * row_bytes for rows, row_bytes, _, _ in sizes) / len(node)
    assert max(assigner.loads.values()) <= share + whole + ragged


def test_large_tensors_are_divided_and_small_ones_are_not():
    mesh = Mesh(tp=4)
    large = assign(ReadAssigner(mesh, (0, 1, 2, 3)), (4096, 8), None, None, SHARE // 1024, 1)
    assert [(part.reader, part.rows) for part in large] == [(r, (r * 1024, (r + 1) * 1024)) for r in range(4)]
    assigner = ReadAssigner(mesh, (0, 1, 2, 3))
    small = [assign(assigner, (4095, 8), None, None, SHARE // 1024, 1) for _ in range(8)]
    assert [[part.reader for part in parts] for parts in small] == [[r] for r in (0, 1, 2, 3, 0, 1, 2, 3)]


def test_transfers_of_a_kind_are_divided_once(monkeypatch):
    """A model of many experts has tens of thousands of transfers, of a few kinds."""
    counted: list[int] = []
    nbytes = TransferKind.nbytes
    monkeypatch.setattr(TransferKind, "nbytes", lambda *args: counted.append(1) or nbytes(*args))
    rows = Partition(64, tuple(((8 * rank, 8 * rank + 8),) for rank in range(8)))
    kind = TransferKind(
        component=None, shape=(64, 4), dtype=None, shard_dim=0, partition=rows, components=(), row_bytes=((64, 8),)
    )  # fmt: skip
    assigner = ReadAssigner(Mesh(tp=8), tuple(range(8)))
    first = assigner.assign_reads(kind)
    once = len(counted)
    assert all(assigner.assign_reads(kind) == first for _ in range(99))
    assert len(counted) == once == 8
    assert set(assigner.loads.values()) == {100 * 8 * 8}


# -- columns -----------------------------------------------------------------------------------------------------------


@PROPERTY
@given(meshes, st.integers(1, 40), st.sampled_from([None, 1, 2, 3, 8]), st.data())
def test_node_columns_cover_what_its_ranks_keep(mesh, width, step, data):
    node = random_node(data.draw, mesh)
    shape, partition = (5, width), data.draw(partitions(width, mesh.tp))
    dim = data.draw(st.sampled_from([None, 0, 1])) if partition is not None else None
    positions = [mesh.coordinates(rank)["tp"] for rank in node]
    start, stop = node_columns(shape, dim, partition, positions, step)
    segments = [segment for tp in positions for segment in column_segments(shape, dim, partition, tp)]
    hull = (min(a for a, _ in segments), max(b for _, b in segments))
    assert 0 <= start <= hull[0]
    assert hull[1] <= stop <= width
    if step is None:
        assert (start, stop) == (0, width)
        return
    assert start % step == 0
    assert stop % step == 0 or stop == width
    if hull[0] % step == 0 and (hull[1] % step == 0 or hull[1] == width):
        assert (start, stop) == hull, "it reads columns that nobody keeps"


@pytest.mark.parametrize(("step", "expected"), [(1, (16, 48)), (16, (16, 48)), (32, (0, 64)), (None, (0, 64))])
def test_node_columns(step, expected):
    assert node_columns((3, 64), 1, even_partition(64, 16, 4), (1, 2), step) == expected


# -- the strategy ------------------------------------------------------------------------------------------------------


def way_by_rows(shape, dim, partition, mesh, nodes) -> str:
    if partition is not None and dim not in (None, 0):
        return SCATTER
    for rank in range(mesh.size):
        mine = kept(shape, dim, partition, mesh.coordinates(rank)["tp"])
        for other in node_ranks(nodes, rank):
            if other != rank and mine & kept(shape, dim, partition, mesh.coordinates(other)["tp"]):
                return SHARED
    return OWN


@PROPERTY
@given(meshes, st.data())
def test_read_strategy(mesh, data):
    nodes = nodes_of(mesh.size, data.draw(st.integers(1, mesh.size + 1)))
    shape, dim, partition = data.draw(tensors(mesh.tp))
    assume(partition is None or len(shape) > 1 or dim == 0)
    way = read_strategy(dim, partition, mesh, nodes)
    assert way in REASONS
    assert way == way_by_rows(shape, dim, partition, mesh, nodes)


@pytest.mark.parametrize(
    ("shape", "expected"), [((7,), (7, 1)), ((3, 5), (3, 5)), ((2, 3, 5), (6, 5)), ((), (1, 1)), ((4, 0), (0, 0))]
)
def test_rows_and_width(shape, expected):
    assert rows_and_width(shape) == expected


@PROPERTY
@given(meshes, st.data())
def test_segments_of_rows_and_columns(mesh, data):
    shape, dim, partition = data.draw(tensors(mesh.tp))
    rows, width = rows_and_width(shape)
    for tp in range(mesh.tp):
        held = row_segments(shape, dim, partition, tp), column_segments(shape, dim, partition, tp)
        counts = [sum(b - a for a, b in segments) for segments in held]
        local = list(shape)
        if partition is not None:
            local[dim] = partition.length(tp)
        assert counts[0] * counts[1] == (rows * width if partition is None else _product(local))


def _product(sizes) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


def test_nodes():
    assert nodes_of(5, 2) == (0, 0, 1, 1, 2)
    assert nodes_of(10, None) == (0,) * 8 + (1,) * 2
    assert node_ranks((0, 1, 0, 1), 3) == (1, 3)
