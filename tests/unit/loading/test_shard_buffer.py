"""Cutting whole rows as they arrive gives what slicing the whole component gives, in whatever pieces they come."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.loading.shard_buffer import ShardBuffer
from distquant.planning import Partition, even_partition
from distquant.planning.read_assignment import node_columns
from distquant.planning.row_map import column_segments, row_segments
from distquant.sharding.layout import ALL, Component
from distquant.sharding.partition import join_partitions
from distquant.sharding.row_layout import RowLayout, column_step, row_layout_of, row_step

PROPERTY = settings(deadline=None, derandomize=True, max_examples=250)
CPU = torch.device("cpu")

block_shape = st.builds(
    lambda down, across: Component(name="", dtype="int32", block_shape=(down, across)),
    st.sampled_from([1, 1, 2, 3]),
    st.sampled_from([1, 2, 3, 8, ALL]),
)
flats = st.builds(lambda flat: Component(name="", dtype="int16", flat=flat), st.sampled_from([1, 2, 4, 8, 12]))


class Case:
    """A weight's components, how it is cut, and what one rank keeps of it.

    Attributes:
        whole: component -> all its elements as `[rows of elements, elements a row]`, or flat where they straddle rows.
    """

    def __init__(self, draw):
        self.shape = draw(st.tuples(st.integers(1, 14), st.integers(1, 26)))
        found = draw(st.lists(st.one_of(block_shape, flats), min_size=1, max_size=3))
        self.components = [
            Component(name=f"c{i}", dtype=c.dtype, block_shape=c.block_shape, flat=c.flat) for i, c in enumerate(found)
        ]
        self.ranks = draw(st.integers(1, 4))
        dim = draw(st.sampled_from([None, 0, 1]))
        self.replicated_components = {c.name for c in self.components if draw(st.booleans())}
        if dim == 1:
            self.replicated_components |= {c.name for c in self.components if c.flat and self.shape[1] % c.flat}
        self.step = row_step(self.components, self.shape)
        self.partition = None if dim is None else self._partition(draw, dim)
        self.shard_dim = None if self.partition is None else dim
        self.whole = {c.name: self._values(c) for c in self.components}

    def _partition(self, draw, dim: int) -> Partition | None:
        """On the grid of what is cut: rows of every component, columns of those that are not statistics."""
        alignment = self.step if dim == 0 else self._column_unit()
        size = self.shape[dim]
        kind = draw(st.sampled_from(["even", "packed", "repeated"]))
        if kind == "packed" and size >= 2 * alignment * self.ranks:
            first = size // 2 // alignment * alignment
            partitions = [
                even_partition(first, alignment, self.ranks),
                even_partition(size - first, alignment, self.ranks),
            ]
            return join_partitions([partition for partition in partitions if partition]) if all(partitions) else None
        if kind == "repeated" and dim == 0 and size % alignment == 0:
            heads = st.lists(st.integers(0, size // alignment - 1), min_size=1, max_size=3)
            parts = tuple(tuple((h, h + 1) for h in sorted(draw(heads))) for _ in range(self.ranks))
            return Partition(size // alignment, parts).scaled(alignment)
        return even_partition(size, alignment, self.ranks)

    def _column_unit(self) -> int:
        partition = (c for c in self.components if c.name not in self.replicated_components)
        return math.lcm(*(c.flat or c.block_shape[1] for c in partition if c.flat or c.block_shape[1] != ALL))

    def _values(self, component: Component) -> np.ndarray:
        stored = component.shape(self.shape)
        numbers = np.arange(1, math.prod(stored) + 1)
        if component.flat and self.shape[1] % component.flat == 0:
            return numbers.reshape(self.shape[0], -1)
        return numbers.reshape(stored)

    def columns(self, component: Component, start: int, stop: int) -> slice:
        """The elements of a row under logical columns."""
        if component.flat:
            return slice(start // component.flat, stop // component.flat)
        found = component.slice(self.shape, 1, start, stop)
        return slice(None) if found is None else slice(*found[1:])

    def expected(self, component: Component, tp: int) -> np.ndarray:
        """What a position keeps of a component, by slicing all of it."""
        whole = self.whole[component.name]
        if component.name in self.replicated_components or self.partition is None:
            return whole.reshape(-1)
        if self.shard_dim == 0:
            pieces = (component.slice(self.shape, 0, a, b) for a, b in self.partition.segments(tp))
            rows = whole.reshape(-1) if component.flat else whole
            return np.concatenate([rows[first:last] for _, first, last in pieces]).reshape(-1)
        if not component.flat and component.block_shape[1] == ALL:
            return whole.reshape(-1)
        return np.concatenate(
            [whole[:, self.columns(component, a, b)] for a, b in self.partition.segments(tp)], axis=1
        ).reshape(-1)

    def encoded_components(
        self, row_layout: RowLayout, component: Component, columns: tuple[int, int], start: int, stop: int
    ):
        """The elements of rows as they flow over a node that reads some columns."""
        whole = self.whole[component.name]
        if whole.ndim == 1:
            values = whole[row_layout.before(start) : row_layout.before(stop)]
        else:
            rows = slice(start // row_layout.row_block, -(-stop // row_layout.row_block))
            values = whole[rows, self.columns(component, *columns)]
        return torch.from_numpy(np.ascontiguousarray(values).reshape(-1)).to(row_layout.dtype)


def pieces_of(rows: int, step: int, chance: random.Random) -> list[tuple[int, int]]:
    edges = [edge for edge in range(step, rows, step) if chance.random() < 0.5]
    found = list(zip([0, *edges], [*edges, rows], strict=True))
    chance.shuffle(found)
    return found


def fill(case: Case, sink: ShardBuffer, row_layouts, columns, chance: random.Random) -> dict[str, int]:
    """Brings all rows in pieces, by one of the two ways where there is a choice; bytes that were placed."""
    moved = dict.fromkeys(sink.memory, 0)
    for start, stop in pieces_of(case.shape[0], case.step, chance):
        for row_layout, component in zip(row_layouts, case.components, strict=True):
            values = case.encoded_components(row_layout, component, columns, start, stop)
            assert len(values) == row_layout.count(start, stop)
            target = sink.direct(row_layout, start, stop)
            if target is not None and chance.random() < 0.6:
                target.copy_(values)
                moved[row_layout.name] += values.nbytes
            else:
                moved[row_layout.name] += sink.place(row_layout, values, start, stop)
    return moved


def sink_for(case: Case, tp: int, columns: tuple[int, int], partial: bool) -> tuple[ShardBuffer, list[RowLayout]]:
    width = columns[1] - columns[0]
    row_layouts = [
        row_layout_of(c, (case.shape[0], width), c.name in case.replicated_components) for c in case.components
    ]
    rows = row_segments(case.shape, case.shard_dim, case.partition, tp)
    kept = column_segments(case.shape, case.shard_dim, case.partition, tp)
    sink = ShardBuffer(row_layouts, columns, case.shape[1], rows, kept, CPU, partial)
    for name, memory in sink.memory.items():
        if not (partial and name in case.replicated_components):
            memory.fill_(-1)
    return sink, row_layouts


@PROPERTY
@given(st.data(), st.randoms(use_true_random=False))
def test_pieces_of_whole_rows_give_the_slice(data, chance):
    case = Case(data.draw)
    for tp in range(case.ranks):
        columns = (0, case.shape[1])
        sink, row_layouts = sink_for(case, tp, columns, False)
        moved = fill(case, sink, row_layouts, columns, chance)
        for component in case.components:
            found = sink.memory[component.name]
            assert found.tolist() == case.expected(component, tp).tolist()
            assert moved[component.name] == found.nbytes


@PROPERTY
@given(st.data(), st.randoms(use_true_random=False))
def test_nodes_that_read_some_columns(data, chance):
    """Each position's shard is right, and the statistics of all nodes together, joined by their maximum, are whole."""
    case = Case(data.draw)
    first = data.draw(st.integers(0, case.ranks))
    joined: dict[str, torch.Tensor] = {}
    for node in (range(first), range(first, case.ranks)):
        step = column_step(case.components, case.shape)
        for tp in node:
            columns = node_columns(case.shape, case.shard_dim, case.partition, node, step)
            sink, row_layouts = sink_for(case, tp, columns, True)
            fill(case, sink, row_layouts, columns, chance)
            for component in case.components:
                found = sink.memory[component.name]
                if component.name in case.replicated_components:
                    joined[component.name] = torch.maximum(joined.get(component.name, found), found)
                else:
                    assert found.tolist() == case.expected(component, tp).tolist()
    for component in case.components:
        if component.name in case.replicated_components:
            assert joined[component.name].tolist() == case.whole[component.name].reshape(-1).tolist()


@PROPERTY
@given(st.data(), st.randoms(use_true_random=False))
def test_rows_that_are_not_kept_are_left_out(data, chance):
    case = Case(data.draw)
    tp, columns = data.draw(st.integers(0, case.ranks - 1)), (0, case.shape[1])
    sink, row_layouts = sink_for(case, tp, columns, False)
    held = {row for a, b in row_segments(case.shape, case.shard_dim, case.partition, tp) for row in range(a, b)}
    for start, stop in pieces_of(case.shape[0], case.step, chance):
        for row_layout, component in zip(row_layouts, case.components, strict=True):
            if row_layout.replicated or held & set(range(start, stop)):
                continue
            assert sink.direct(row_layout, start, stop) is None
            assert (
                sink.place(
                    row_layout, case.encoded_components(row_layout, component, columns, start, stop), start, stop
                )
                == 0
            )
    assert all((memory == -1).all() for memory in sink.memory.values())


def test_rows_that_a_rank_holds_twice_have_no_single_place():
    row_layout = row_layout_of(Component(name="", dtype="int32"), (4, 2))
    sink = ShardBuffer((row_layout,), (0, 2), 2, [(0, 2), (0, 2), (2, 4)], [(0, 2)], CPU)
    assert sink.direct(row_layout, 0, 2) is None
    assert sink.direct(row_layout, 1, 3) is None
    assert sink.direct(row_layout, 2, 4).data_ptr() == sink.memory[""][8:].data_ptr()
    assert sink.place(row_layout, torch.arange(4, dtype=torch.int32), 0, 2) == 32
    sink.direct(row_layout, 2, 4).copy_(torch.arange(4, 8))
    assert sink.memory[""].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]
