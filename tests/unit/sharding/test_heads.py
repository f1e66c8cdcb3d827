"""Partitions of heads: each local query head meets exactly its own kv head, at every width."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import assert_owned_partitions, held

from distquant.planning import head_partitions

PROPERTY = settings(deadline=None, derandomize=True, max_examples=250)


def assert_exact(partition, heads: int, kv_heads: int, ranks: int) -> None:
    groups = heads // kv_heads
    assert (partition.query.size, partition.kv.size, len(partition.groups)) == (heads, kv_heads, ranks)
    assert [h for rank in range(ranks) for h in held(partition.query, rank)] == list(range(heads))
    assert min(partition.query.lengths) > 0
    for rank in range(ranks):
        query, kv = held(partition.query, rank), held(partition.kv, rank)
        assert len(kv) * partition.groups[rank] == len(query)
        assert [kv[local // partition.groups[rank]] for local in range(len(query))] == [h // groups for h in query]
    assert_owned_partitions(partition.query)
    assert_owned_partitions(partition.kv)


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 7), st.integers(1, 9))
def test_every_partition_is_exact(kv_heads, groups, ranks):
    heads = kv_heads * groups
    partitions = list(head_partitions(heads, kv_heads, ranks))
    assert bool(partitions) == (ranks <= heads)
    for partition in partitions:
        assert_exact(partition, heads, kv_heads, ranks)
    if ranks <= kv_heads:
        first = partitions[0]
        assert first.kv.repeated == 0
        assert set(first.groups) == {groups}
        assert max(first.kv.lengths) - min(first.kv.lengths) <= 1
    elif partitions:
        first = partitions[0]
        assert max(first.query.lengths) - min(first.query.lengths) <= 1


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 7), st.integers(2, 9))
def test_unrepeated_kv_heads_come_before_repeated_ones(kv_heads, groups, ranks):
    """Once a partition stores a kv head twice or splits a group over ranks, no later one is plain."""
    partitions = list(head_partitions(kv_heads * groups, kv_heads, ranks))
    steps = [s for s in range(1, kv_heads // ranks + 1) if len(range(0, kv_heads, s)) >= ranks]
    assert all(
        partition.kv.repeated == 0 and set(partition.groups) == {groups} for partition in partitions[: len(steps)]
    )
    for partition, step in zip(partitions[: len(steps)], steps, strict=True):
        assert partition.kv.legal(step)
        counts = [len(range(0, length, step)) for length in partition.kv.lengths]
        assert max(counts) - min(counts) <= 1
    for partition in partitions[len(steps) :]:
        fits = [s for s in range(1, kv_heads * groups + 1) if partition.query.legal(s)]
        spreads = [[len(range(0, n, s)) for n in partition.query.lengths] for s in fits]
        assert any(max(counts) - min(counts) <= 1 for counts in spreads)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "kv", "groups"),
    [
        (8, 2, 4, [[0], [0], [1], [1]], (2, 2, 2, 2)),
        (8, 4, 2, [[0, 1], [2, 3]], (2, 2)),
        (8, 4, 3, [[0, 1], [2], [3]], (2, 2, 2)),
        (6, 2, 3, [[0], [0, 1], [1]], (2, 1, 2)),
        (10, 2, 3, [[0], [0, 1, 1], [1]], (4, 1, 3)),
        (9, 3, 4, [[0], [1], [1, 2], [2]], None),
        (8, 8, 8, [[h] for h in range(8)], (1,) * 8),
        (4, 1, 4, [[0]] * 4, (1,) * 4),
    ],
)
def test_first_partition_by_hand(heads, kv_heads, ranks, kv, groups):
    partition = next(head_partitions(heads, kv_heads, ranks))
    if groups is not None:
        assert [held(partition.kv, rank) for rank in range(ranks)] == kv
        assert partition.groups == groups
    assert_exact(partition, heads, kv_heads, ranks)


def test_repeated_kv_heads_are_counted():
    partition = next(head_partitions(8, 2, 4))
    assert partition.kv.repeated == 2
    assert [bool(partition.kv.owned(rank)) for rank in range(4)] == [True, False, True, False]
    partition = next(head_partitions(10, 2, 3))
    assert partition.kv.repeated == 3


def test_more_ranks_than_heads_have_no_partition():
    assert list(head_partitions(8, 2, 9)) == []


def test_small_steps_come_before_large_ones():
    lengths = [partition.kv.lengths for partition in islice(head_partitions(16, 8, 3), 2)]
    assert lengths == [[3, 3, 2], [4, 2, 2]]


def test_describe():
    partition = next(head_partitions(10, 2, 3))
    assert [partition.describe(rank) for rank in range(3)] == [
        "query heads 0-3, kv heads 0, 4 query heads to each kv head",
        "query heads 4-6, kv heads 0,1,1, 1 query heads to each kv head",
        "query heads 7-9, kv heads 1, 3 query heads to each kv head",
    ]
