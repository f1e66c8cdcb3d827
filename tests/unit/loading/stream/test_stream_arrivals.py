"""Arrivals: rows are counted once, tensors are finished in order, and the rank that is late is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_stream_pieces import task_of

from distquant.errors import DistquantError
from distquant.loading.stream.arrivals import ArrivalTracker
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.tasks import Task
from distquant.planning.read_assignment import ReadItem
from distquant.sharding.layout import Component
from distquant.sharding.row_layout import row_layout_of


def task(index: int, *reads: ReadItem, whole: bool = False) -> Task:
    found = task_of(index, (12, 4), "F32", 0, [Component(name="", dtype="uint8")], list(reads))
    if whole:
        found = replace(
            found,
            row_layouts=(
                *found.row_layouts,
                row_layout_of(Component(name="s", dtype="float32", flat=4), (12, 4), True),
            ),
        )
    return found


def three(index: int) -> Task:
    """Four rows for each of three ranks to read, for all of them."""
    return task(index, *(ReadItem(rank, (4 * rank, 4 * rank + 4), (0, 1, 2)) for rank in range(3)))


def test_tensors_are_finished_in_their_order():
    arrivals = ArrivalTracker([three(0), three(1)], 0, LoadState(1))
    arrivals.count(arrivals.tasks[1], 0, 12)
    assert not arrivals.next_is_complete()
    for start in (8, 0, 4):
        assert not arrivals.next_is_complete()
        arrivals.count(arrivals.tasks[0], start, start + 4)
    arrivals.await_next()
    arrivals.finished()
    assert arrivals.next_is_complete()
    arrivals.finished()
    assert arrivals.ended
    assert not arrivals.next_is_complete()


def test_rows_that_a_rank_does_not_keep_are_not_waited_for():
    reads = ReadItem(0, (0, 4), (0,)), ReadItem(1, (4, 12), (1, 2))
    for rank, rows in ((0, (0, 4)), (1, (4, 12)), (2, (4, 12))):
        arrivals = ArrivalTracker([task(0, *reads)], rank, LoadState(1))
        arrivals.count(arrivals.tasks[0], *rows)
        assert arrivals.next_is_complete()


def test_statistics_of_all_rows_are_waited_for():
    arrivals = ArrivalTracker(
        [task(0, ReadItem(0, (0, 4), (0,)), ReadItem(1, (4, 12), (1,)), whole=True)], 0, LoadState(1)
    )
    arrivals.count(arrivals.tasks[0], 0, 4)
    assert not arrivals.next_is_complete()
    arrivals.count(arrivals.tasks[0], 4, 12)
    assert arrivals.next_is_complete()


def test_rows_that_arrive_twice_are_an_error():
    arrivals = ArrivalTracker([three(0)], 0, LoadState(1))
    arrivals.count(arrivals.tasks[0], 4, 8)
    with pytest.raises(DistquantError, match="rows 4 to 8 of t0 arrived twice"):
        arrivals.count(arrivals.tasks[0], 4, 8)


def test_unfinished_bytes():
    reads = (ReadItem(0, (0, 12), (0, 1)),)
    arrivals = ArrivalTracker(
        [task(0, *reads, whole=True), task(1, *reads), task(2, *reads, whole=True)], 0, LoadState(1)
    )
    each = 12 * 4
    assert [arrivals.unfinished_bytes(t) for t in arrivals.tasks] == [each, each, 2 * each]
    arrivals.count(arrivals.tasks[0], 0, 12)
    arrivals.finished()
    assert arrivals.unfinished_bytes(arrivals.tasks[2]) == each


@pytest.mark.parametrize("silent", [1, 2])
@pytest.mark.parametrize("sent", [0, 2])
def test_late_rank_is_named(silent, sent):
    """The one whose rows are missing, also where its first ones did come."""
    arrivals = ArrivalTracker([three(0)], 0, LoadState(7))
    for rank in range(3):
        for start in (0, 2):
            if rank != silent or start < sent:
                arrivals.count(arrivals.tasks[0], 4 * rank + start, 4 * rank + start + 2)
    error = arrivals.late()
    assert error.rank == silent
    assert "t0" in str(error)
    assert "7 s" in str(error)
