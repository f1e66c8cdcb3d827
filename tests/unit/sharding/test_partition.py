"""Partitions against brute force: each element held, one owner, boundaries on alignments, as even as possible."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import assert_owned_partitions, held

from distquant.planning import Partition, even_partition
from distquant.sharding.partition import join_partitions

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)

sizes = st.integers(1, 700)
alignments = st.sampled_from([1, 2, 3, 8, 16, 32, 64, 96, 128])
widths = st.integers(1, 9)


@PROPERTY
@given(sizes, alignments, widths)
def test_even_partition(size, alignment, ranks):
    partition = even_partition(size, alignment, ranks)
    if partition is None:
        assert len(range(0, size, alignment)) < ranks
        return
    assert len(range(0, size, alignment)) >= ranks
    assert partition.size == size
    assert [e for rank in range(ranks) for e in held(partition, rank)] == list(range(size))
    assert min(partition.lengths) > 0
    assert partition.lengths == [len(held(partition, rank)) for rank in range(ranks)]
    counts = [len({e // alignment for e in held(partition, rank)}) for rank in range(ranks)]
    assert sum(counts) == len(range(0, size, alignment)), "a block is shared by two ranks"
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True), "surplus blocks go to the first ranks"
    assert partition.legal(alignment)
    assert partition.repeated == 0
    assert_owned_partitions(partition)


@pytest.mark.parametrize(
    ("size", "alignment", "ranks", "lengths"),
    [
        (704, 64, 2, [384, 320]),
        (704, 64, 3, [256, 256, 192]),
        (352, 32, 4, [96, 96, 96, 64]),
        (100, 16, 3, [48, 32, 20]),
        (96, 32, 3, [32, 32, 32]),
        (7, 1, 7, [1] * 7),
        (65, 64, 2, [64, 1]),
    ],
)
def test_even_partition_by_hand(size, alignment, ranks, lengths):
    assert even_partition(size, alignment, ranks).lengths == lengths


@pytest.mark.parametrize(("size", "alignment", "ranks"), [(64, 64, 2), (704, 64, 12), (1, 1, 2), (100, 128, 2)])
def test_fewer_blocks_than_ranks_have_no_partition(size, alignment, ranks):
    assert even_partition(size, alignment, ranks) is None


@PROPERTY
@given(st.lists(sizes, min_size=1, max_size=4), alignments, widths)
def test_join_parts(parts, alignment, ranks):
    partitions = [even_partition(size, alignment, ranks) for size in parts]
    if any(partition is None for partition in partitions):
        return
    joined = join_partitions(partitions)
    assert joined.size == sum(parts)
    for rank in range(ranks):
        expected, offset = [], 0
        for partition in partitions:
            expected += [offset + element for element in held(partition, rank)]
            offset += partition.size
        assert held(joined, rank) == expected
    assert joined.repeated == 0
    assert_owned_partitions(joined)


def test_join_parts_is_legal_only_if_parts_begin_on_the_grid():
    even, odd = even_partition(128, 64, 2), even_partition(96, 64, 2)
    assert join_partitions([even, even]).legal(64)
    assert odd.legal(64)
    assert not join_partitions([odd, odd]).legal(64)
    assert join_partitions([odd, odd]).legal(32)


@PROPERTY
@given(sizes, alignments, widths, st.integers(1, 5), st.integers(1, 200))
def test_scaled_and_legal(size, alignment, ranks, factor, grid):
    partition = even_partition(size, alignment, ranks)
    if partition is None:
        return
    scaled = partition.scaled(factor)
    assert scaled.size == size * factor
    for rank in range(ranks):
        expected = [e * factor + i for e in held(partition, rank) for i in range(factor)]
        assert held(scaled, rank) == expected
    inner = [partition.segments(rank)[0][0] for rank in range(ranks)]
    assert partition.legal(grid) == all(edge % grid == 0 for edge in inner)


segments = st.lists(
    st.tuples(st.integers(0, 19), st.integers(1, 8)).map(lambda t: (t[0], min(t[0] + t[1], 20))), min_size=1, max_size=4
)


@PROPERTY
@given(st.lists(segments, min_size=1, max_size=5))
def test_owned_with_overlaps_and_repeats(parts):
    """Also where a rank stores an element twice, and in any order: the first copy of the first holder counts."""
    covering = [*parts, [(0, 20)]]
    partition = Partition(20, tuple(map(tuple, covering)))
    assert_owned_partitions(partition)
    for rank in range(len(covering)):
        copies = held(partition, rank)
        for (start, stop), at in partition.owned(rank):
            assert [copies.index(e) for e in range(start, stop)] == list(range(at, at + stop - start))
    assert partition.repeated == sum(len(held(partition, r)) for r in range(len(covering))) - 20
