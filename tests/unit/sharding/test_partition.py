"""Cuts against brute force: every element held, exactly one owner, boundaries on units, as even as units allow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.planning import Cut, even_cut
from distquant.sharding.partition import join_parts

PROPERTY = settings(deadline=None, derandomize=True, max_examples=300)

sizes = st.integers(1, 700)
units = st.sampled_from([1, 2, 3, 8, 16, 32, 64, 96, 128])
widths = st.integers(1, 9)


def held(cut: Cut, rank: int) -> list[int]:
    """Elements that a rank stores, in local order."""
    return [element for start, stop in cut.segments(rank) for element in range(start, stop)]


def assert_owned_partitions(cut: Cut) -> None:
    """Every element has one owner, which stores it where `owned` says."""
    owners: dict[int, int] = {}
    for rank in range(len(cut.parts)):
        local = held(cut, rank)
        for (start, stop), at in cut.owned(rank):
            assert start < stop
            assert local[at : at + stop - start] == list(range(start, stop))
            for element in range(start, stop):
                assert element not in owners, f"{element} is owned by {owners[element]} and {rank}"
                owners[element] = rank
    assert set(owners) == set(range(cut.size))
    first_holder: dict[int, int] = {}
    for rank in range(len(cut.parts)):
        for element in held(cut, rank):
            first_holder.setdefault(element, rank)
    assert owners == first_holder


@PROPERTY
@given(sizes, units, widths)
def test_even_cut(size, unit, ranks):
    cut = even_cut(size, unit, ranks)
    if cut is None:
        assert len(range(0, size, unit)) < ranks
        return
    assert len(range(0, size, unit)) >= ranks
    assert cut.size == size
    assert [e for rank in range(ranks) for e in held(cut, rank)] == list(range(size))
    assert min(cut.lengths) > 0
    assert cut.lengths == [len(held(cut, rank)) for rank in range(ranks)]
    counts = [len({e // unit for e in held(cut, rank)}) for rank in range(ranks)]
    assert sum(counts) == len(range(0, size, unit)), "a unit is shared by two ranks"
    assert max(counts) - min(counts) <= 1
    assert counts == sorted(counts, reverse=True), "surplus units go to the first ranks"
    assert cut.legal(unit)
    assert cut.repeated == 0
    assert_owned_partitions(cut)


@pytest.mark.parametrize(
    ("size", "unit", "ranks", "lengths"),
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
def test_even_cut_by_hand(size, unit, ranks, lengths):
    assert even_cut(size, unit, ranks).lengths == lengths


@pytest.mark.parametrize(("size", "unit", "ranks"), [(64, 64, 2), (704, 64, 12), (1, 1, 2), (100, 128, 2)])
def test_fewer_units_than_ranks_is_no_cut(size, unit, ranks):
    assert even_cut(size, unit, ranks) is None


@PROPERTY
@given(st.lists(sizes, min_size=1, max_size=4), units, widths)
def test_join_parts(parts, unit, ranks):
    cuts = [even_cut(size, unit, ranks) for size in parts]
    if any(cut is None for cut in cuts):
        return
    joined = join_parts(cuts)
    assert joined.size == sum(parts)
    for rank in range(ranks):
        expected, offset = [], 0
        for cut in cuts:
            expected += [offset + element for element in held(cut, rank)]
            offset += cut.size
        assert held(joined, rank) == expected
    assert joined.repeated == 0
    assert_owned_partitions(joined)


def test_join_parts_is_legal_only_if_parts_begin_on_the_grid():
    even, odd = even_cut(128, 64, 2), even_cut(96, 64, 2)
    assert join_parts([even, even]).legal(64)
    assert odd.legal(64)
    assert not join_parts([odd, odd]).legal(64)
    assert join_parts([odd, odd]).legal(32)


@PROPERTY
@given(sizes, units, widths, st.integers(1, 5), st.integers(1, 200))
def test_scaled_and_legal(size, unit, ranks, factor, grid):
    cut = even_cut(size, unit, ranks)
    if cut is None:
        return
    scaled = cut.scaled(factor)
    assert scaled.size == size * factor
    for rank in range(ranks):
        expected = [e * factor + i for e in held(cut, rank) for i in range(factor)]
        assert held(scaled, rank) == expected
    inner = [cut.segments(rank)[0][0] for rank in range(ranks)]
    assert cut.legal(grid) == all(edge % grid == 0 for edge in inner)


segments = st.lists(
    st.tuples(st.integers(0, 19), st.integers(1, 8)).map(lambda t: (t[0], min(t[0] + t[1], 20))), min_size=1, max_size=4
)


@PROPERTY
@given(st.lists(segments, min_size=1, max_size=5))
def test_owned_with_overlaps_and_repeats(parts):
    """Also where a rank stores an element twice, and in any order: the first copy of the first holder counts."""
    covering = [*parts, [(0, 20)]]
    cut = Cut(20, tuple(map(tuple, covering)))
    assert_owned_partitions(cut)
    for rank in range(len(covering)):
        copies = held(cut, rank)
        for (start, stop), at in cut.owned(rank):
            assert [copies.index(e) for e in range(start, stop)] == list(range(at, at + stop - start))
    assert cut.repeated == sum(len(held(cut, r)) for r in range(len(covering))) - 20
