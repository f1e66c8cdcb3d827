"""Layouts against brute force: the stored element of each logical element, sliced and counted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.dtypes import DTYPE_BYTES
from distquant.planning import even_partition
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout, plain

PROPERTY = settings(deadline=None, derandomize=True, max_examples=100)

CODES4 = Component(name="", dtype="uint8", flat=2)
ABSMAX = Component(name="absmax", dtype="float32", flat=64, preferred_alignments=(64, 32))
NF4 = Layout((CODES4, ABSMAX))
NESTED = Component(name="nested_absmax", dtype="float32", flat=64 * 256, replicated=True)
NF4_DQ = Layout((CODES4, Component(name="absmax", dtype="uint8", flat=64, preferred_alignments=(64, 32)), NESTED))
SCB = Component(name="SCB", dtype="float32", block_shape=(1, ALL), preferred_alignments=PLAIN_STEPS)
INT8 = Layout((Component(name="", dtype="int8", preferred_alignments=PLAIN_STEPS), SCB))
SCALES = Component(name="scale", dtype="float32", block_shape=(128, 128))
FP8 = Layout((Component(name="", dtype="float8_e4m3fn"), SCALES))
GROUPS = Component(name="scales", dtype="bfloat16", block_shape=(1, 128))
INT4 = Layout(
    (
        Component(name="", dtype="int32", block_shape=(1, 8)),
        GROUPS,
        Component(name="g", dtype="int32", block_shape=(8, 128)),
    )
)
LAYOUTS = {"nf4": NF4, "nf4-dq": NF4_DQ, "int8": INT8, "fp8": FP8, "int4": INT4, "plain": plain("bfloat16")}

shapes = st.tuples(
    st.one_of(st.integers(1, 40), st.sampled_from([64, 96, 100, 128, 256])),
    st.one_of(st.integers(1, 150), st.sampled_from([32, 64, 96, 100, 128, 160, 352, 384, 704])),
)


def index(component: Component, weight: tuple[int, ...]) -> torch.Tensor:
    """For each logical element the number of the stored element that covers it, counted row-major."""
    if component.flat:
        return torch.arange(math.prod(weight)).view(weight) // component.flat
    number = torch.zeros(weight, dtype=torch.int64)
    for dim, (size, span) in enumerate(zip(weight, component.block_shape, strict=True)):
        along = torch.zeros(size, dtype=torch.int64) if span == ALL else torch.arange(size) // span
        shape = [1] * len(weight)
        shape[dim] = size
        number = number * (int(along.max()) + 1) + along.view(shape)
    return number


def stored(component: Component, weight: tuple[int, ...]) -> int:
    return len(index(component, weight).unique())


def from_one(component: Component, weight: tuple[int, ...], dim: int, start: int, stop: int, block: int) -> bool:
    """Whether each stored element of the local slice lies under one global stored element.

    A flat component is stored locally in blocks of `block` logical elements.
    """
    local = index(component, weight).narrow(dim, start, stop - start)
    if component.flat:
        own = torch.arange(local.numel()) // block
    else:
        own = index(component, tuple(local.shape)).reshape(-1)
    pairs = (own * (int(local.max()) + 1) + local.reshape(-1)).unique()
    return len(own.unique()) == len(pairs)


@PROPERTY
@given(st.sampled_from(sorted(LAYOUTS)), shapes)
def test_shape_and_nbytes(name, weight):
    layout = LAYOUTS[name]
    total = 0
    for component in layout.components:
        assert math.prod(component.shape(weight)) == stored(component, weight)
        assert component.nbytes(weight) == stored(component, weight) * DTYPE_BYTES[component.dtype]
        assert len(component.shape(weight)) == (1 if component.flat else 2)
        total += component.nbytes(weight)
    assert layout.nbytes(weight) == total


@PROPERTY
@given(st.sampled_from(sorted(LAYOUTS)), shapes, st.integers(0, 1), st.integers(1, 9))
def test_partition_at_a_legal_alignment_is_exact(name, weight, dim, ranks):
    """At every legal alignment each local stored element comes from one global one, for every limiting component."""
    layout = LAYOUTS[name]
    for alignment in layout.alignments(weight, dim):
        partition = even_partition(weight[dim], alignment, ranks)
        if partition is None:
            continue
        for component in layout.components:
            if component.replicated:
                continue
            block = component.flat
            if component.flat and dim == 1:
                block = max(
                    b
                    for b in component.preferred_alignments or (component.flat,)
                    if weight[1] % b == 0 and alignment % b == 0
                )
            for rank in range(ranks):
                ((start, stop),) = partition.segments(rank)
                assert from_one(component, weight, dim, start, stop, block), (component.name, alignment, start, stop)


@PROPERTY
@given(st.sampled_from(["nf4", "nf4-dq"]), shapes)
def test_flat_alignment_of_rows_is_the_smallest(name, weight):
    """No smaller step of dim 0 begins on a block boundary at each of its multiples."""
    (alignment,) = LAYOUTS[name].alignments(weight, 0)
    row = weight[1]
    fits = [u for u in range(1, alignment + 1) if all(u * i * row % 64 == 0 for i in range(1, 65))]
    assert fits == [alignment]


@PROPERTY
@given(shapes)
def test_flat_blocks_are_partitioned_along_in_only_where_they_divide_the_row(weight):
    expected = tuple(block for block in (64, 32) if weight[1] % block == 0)
    assert NF4.alignments(weight, 1) == expected
    assert NF4_DQ.alignments(weight, 1) == expected


@PROPERTY
@given(st.sampled_from(sorted(LAYOUTS)), shapes, st.data())
def test_slice_covers_exactly_what_the_slice_touches(name, weight, data):
    """`slice` names the stored elements under any slice of the weight, and no other ones."""
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, weight[dim] - 1))
    stop = data.draw(st.integers(start + 1, weight[dim]))
    for component in LAYOUTS[name].components:
        touched = index(component, weight).narrow(dim, start, stop - start).unique()
        found = component.slice(weight, dim, start, stop)
        if found is None:
            whole = component.flat == 0 and component.block_shape[dim] == ALL
            assert whole or (component.flat and dim == 1)
            assert not whole or len(touched) == stored(component, weight)
            continue
        at, first, last = found
        shape = component.shape(weight)
        assert 0 <= first < last <= shape[at]
        numbers = torch.arange(math.prod(shape)).view(shape).narrow(at, first, last - first)
        assert numbers.reshape(-1).tolist() == touched.tolist()


@PROPERTY
@given(st.sampled_from(sorted(LAYOUTS)), shapes, st.integers(0, 1), st.integers(1, 9))
def test_legal_slices_partition_each_component(name, weight, dim, ranks):
    """At a legal alignment every stored element of a sliceable component lies in exactly one rank's slice."""
    layout = LAYOUTS[name]
    for alignment in layout.alignments(weight, dim):
        partition = even_partition(weight[dim], alignment, ranks)
        if partition is None:
            continue
        for component in layout.components:
            slices = [component.slice(weight, dim, *partition.segments(rank)[0]) for rank in range(ranks)]
            if component.replicated or None in slices:
                assert component.replicated or set(slices) == {None}
                continue
            size = component.shape(weight)[slices[0][0]]
            assert [i for _, first, last in slices for i in range(first, last)] == list(range(size))


@pytest.mark.parametrize(
    ("name", "weight", "dim", "alignments"),
    [
        ("nf4", (256, 704), 1, (64, 32)),
        ("nf4", (256, 352), 1, (32,)),
        ("nf4", (256, 352), 0, (2,)),
        ("nf4", (256, 96), 0, (2,)),
        ("nf4", (256, 100), 0, (16,)),
        ("nf4", (256, 100), 1, ()),
        ("nf4", (256, 63), 0, (64,)),
        ("nf4-dq", (256, 128), 0, (1,)),
        ("int8", (64, 64), 0, (16, 1)),
        ("int8", (64, 64), 1, (16, 1)),
        ("fp8", (256, 300), 0, (128,)),
        ("fp8", (256, 300), 1, (128,)),
        ("int4", (64, 256), 0, (8,)),
        ("int4", (64, 256), 1, (128,)),
        ("plain", (64, 256), 1, (16, 1)),
    ],
)
def test_alignments_by_hand(name, weight, dim, alignments):
    assert LAYOUTS[name].alignments(weight, dim) == alignments


def test_an_illegal_step_is_caught_by_the_same_check():
    """The brute force fails where a partition is wrong: half a block, a row that blocks straddle, part of a tile."""
    assert not from_one(ABSMAX, (4, 128), 1, 32, 128, 64)
    assert from_one(ABSMAX, (4, 128), 1, 32, 128, 32)
    assert not from_one(ABSMAX, (4, 96), 0, 1, 4, 64)
    assert from_one(ABSMAX, (4, 96), 0, 2, 4, 64)
    assert not from_one(SCALES, (256, 256), 0, 64, 256, 0)


def test_fused_experts_in_three_dims():
    weight = (4, 6, 96)
    assert NF4.alignments(weight, 0) == (1,)
    assert NF4.alignments((5, 3, 11), 0) == (64,)
    assert plain("bfloat16", 3).alignments(weight, 2) == (16, 1)
    assert plain("bfloat16", 3).nbytes(weight) == 2 * 4 * 6 * 96
    assert ABSMAX.slice(weight, 0, 1, 3) == (0, 9, 27)
    blocks = Component(name="scale", dtype="float32", block_shape=(1, 2, 32))
    assert blocks.shape(weight) == (4, 3, 3)
    assert blocks.slice(weight, 1, 2, 5) == (1, 1, 3)


def test_levels_are_combined_preferred_with_preferred():
    a = Component(name="", dtype="int8", preferred_alignments=(16, 1))
    b = Component(name="b", dtype="float32", block_shape=(1, 8), preferred_alignments=(24, 8))
    assert Layout((a, b)).alignments((64, 96), 1) == (48, 8)
    assert Layout((a, b)).alignments((64, 96), 0) == (48, 8)
    assert Layout((Component(name="b", dtype="int8", replicated=True),)).alignments((4, 4), 0) == (1,)


def test_component_by_name():
    assert NF4.component("absmax") is ABSMAX
    assert NF4.component("") is CODES4
    with pytest.raises(KeyError, match="SCB"):
        NF4.component("SCB")


def test_dtype_bytes_are_torchs():
    for name, size in DTYPE_BYTES.items():
        assert getattr(torch, name).itemsize == size
