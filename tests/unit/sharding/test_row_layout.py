"""Row layouts against brute force: the stored element that covers each logical one, by the declared component."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.sharding.layout import ALL, Component
from distquant.sharding.row_layout import RowLayout, column_step, row_layout_of, row_step

PROPERTY = settings(deadline=None, derandomize=True, max_examples=200)

block_shape = st.builds(
    lambda down, across: Component(name="c", dtype="int16", block_shape=(down, across)),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3, 8, ALL]),
)
flats = st.builds(lambda flat: Component(name="c", dtype="uint8", flat=flat), st.sampled_from([1, 2, 3, 4, 8, 64]))
components = st.one_of(block_shape, flats)
shapes = st.tuples(st.integers(1, 13), st.integers(1, 24))


def element(component: Component, shape: tuple[int, int], row: int, column: int) -> int:
    """Position, row by row, of the stored element that covers a logical one."""
    if component.flat:
        return (row * shape[1] + column) // component.flat
    down, across = component.block_shape
    across = shape[1] if across == ALL else across
    return row // down * math.ceil(shape[1] / across) + column // across


def elements(component: Component, shape: tuple[int, int], rows: range, columns: range | None = None) -> set[int]:
    return {element(component, shape, r, c) for r in rows for c in (columns or range(shape[1]))}


@PROPERTY
@given(components, shapes)
def test_elements_before_a_row(component, shape):
    row_layout, step = row_layout_of(component, shape), row_step([component], shape)
    for row in {*range(0, shape[0], step), shape[0]}:
        assert row_layout.before(row) == len(elements(component, shape, range(row)))
    assert row_layout.before(shape[0]) == math.prod(component.shape(shape))
    assert row_layout.nbytes(0, shape[0]) == component.nbytes(shape)
    assert row_layout.count(0, shape[0]) == row_layout.before(shape[0])


@PROPERTY
@given(st.lists(components, min_size=1, max_size=3), shapes)
def test_row_step_divides_no_element(found, shape):
    step = row_step(found, shape)
    for component in found:
        row_layout = row_layout_of(component, shape)
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            mine = elements(component, shape, range(start, stop))
            assert mine == set(range(row_layout.before(start), row_layout.before(stop)))
            assert not mine & elements(component, shape, range(stop, shape[0]))


@PROPERTY
@given(st.lists(components, min_size=1, max_size=3), shapes)
def test_row_step_is_the_least(found, shape):
    """Over rows enough that every element meets the end of some row."""
    tall = (200, shape[1])
    step = row_step(found, tall)
    for smaller in range(1, min(step, 100)):
        shared = [
            elements(c, tall, range(smaller - 1, smaller)) & elements(c, tall, range(smaller, smaller + 1))
            for c in found
        ]
        assert any(shared), f"rows could be quantized separately at {smaller}, not only at {step}"


@PROPERTY
@given(st.lists(components, min_size=1, max_size=3), shapes)
def test_column_step_divides_no_element(found, shape):
    step = column_step(found, shape)
    rows, width = shape
    if step is None:
        assert any((c.flat and width % c.flat) or (not c.flat and c.block_shape[1] == ALL) for c in found)
        return
    for component in found:
        for edge in range(step, width, step):
            left = elements(component, shape, range(rows), range(edge))
            assert not left & elements(component, shape, range(rows), range(edge, width))


@PROPERTY
@given(block_shape, shapes, st.data())
def test_columns_are_those_of_the_component(component, shape, data):
    """A run of columns at the component's grid, against the slice that the layout itself derives."""
    row_layout = row_layout_of(component, shape)
    across = component.block_shape[1]
    if across == ALL:
        assert row_layout.per_row == 1
        assert row_layout.columns(0, shape[1]) == (0, 1)
        return
    edges = [*range(0, shape[1], across), shape[1]]
    start, stop = sorted(data.draw(st.tuples(st.sampled_from(edges), st.sampled_from(edges))))
    assert (1, *row_layout.columns(start, stop)) == component.slice(shape, 1, start, stop)


@PROPERTY
@given(components, shapes, st.data())
def test_rows_are_those_of_the_component(component, shape, data):
    row_layout, step = row_layout_of(component, shape), row_step([component], shape)
    edges = [*range(0, shape[0], step), shape[0]]
    start, stop = sorted(data.draw(st.tuples(st.sampled_from(edges), st.sampled_from(edges))))
    _, first, last = component.slice(shape, 0, start, stop)
    per = 1 if component.flat else row_layout.per_row
    if start < stop:
        assert (row_layout.before(start), row_layout.before(stop)) == (first * per, last * per)


def test_flat_elements_that_fill_rows_have_columns():
    row_layout = row_layout_of(Component(name="absmax", dtype="float32", flat=64), (3, 128))
    assert (row_layout.column_block, row_layout.per_row, row_layout.columns(64, 128)) == (64, 2, (1, 2))


def test_flat_elements_that_straddle_rows_have_none():
    component = Component(name="absmax", dtype="float32", flat=64)
    row_layout = row_layout_of(component, (3, 96))
    assert (row_layout.column_block, row_layout.before(2), row_layout.before(3)) == (0, 3, 5)
    assert row_step([component], (3, 96)) == 2
    assert column_step([component], (3, 96)) is None


def test_reduction_over_all_rows_cannot_be_sent_by_rows():
    with pytest.raises(ValueError, match="'scale' reduces over all rows"):
        row_layout_of(Component(name="scale", dtype="float32", block_shape=(ALL, 1)), (4, 4))


def test_row_layout_keeps_the_declared_values():
    row_layout = row_layout_of(Component(name="SCB", dtype="float32", block_shape=(1, ALL)), (5, 8), replicated=True)
    assert isinstance(row_layout, RowLayout)
    assert (row_layout.name, row_layout.dtype.itemsize, row_layout.replicated, row_layout.nbytes(1, 3)) == (
        "SCB",
        4,
        True,
        8,
    )
