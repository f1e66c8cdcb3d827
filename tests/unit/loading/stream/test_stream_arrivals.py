"""The ledger: what has come, once; what is finished, in order; and who is late."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_stream_pieces import task_of

from distquant.errors import DistquantError
from distquant.loading.stream.arena import Board
from distquant.loading.stream.ledger import Ledger
from distquant.loading.stream.tasks import Task
from distquant.planning.read_assignment import Part
from distquant.sharding.layout import Component
from distquant.sharding.row_layout import band_of


def task(index: int, *parts: Part, whole: bool = False) -> Task:
    found = task_of(index, (12, 4), "F32", 0, [Component(name="", dtype="uint8")], list(parts))
    if whole:
        found = replace(
            found, bands=(*found.bands, band_of(Component(name="s", dtype="float32", flat=4), (12, 4), True))
        )
    return found


def three(index: int) -> Task:
    """Four rows for each of three ranks to read, for all of them."""
    return task(index, *(Part(rank, (4 * rank, 4 * rank + 4), (0, 1, 2)) for rank in range(3)))


def test_tensors_are_finished_in_their_order():
    ledger = Ledger([three(0), three(1)], 0, Board(1))
    ledger.count(ledger.tasks[1], 0, 12)
    assert not ledger.next_is_complete()
    for start in (8, 0, 4):
        assert not ledger.next_is_complete()
        ledger.count(ledger.tasks[0], start, start + 4)
    ledger.await_next()
    ledger.finished()
    assert ledger.next_is_complete()
    ledger.finished()
    assert ledger.ended
    assert not ledger.next_is_complete()


def test_rows_that_a_rank_does_not_keep_are_not_waited_for():
    parts = Part(0, (0, 4), (0,)), Part(1, (4, 12), (1, 2))
    for rank, rows in ((0, (0, 4)), (1, (4, 12)), (2, (4, 12))):
        ledger = Ledger([task(0, *parts)], rank, Board(1))
        ledger.count(ledger.tasks[0], *rows)
        assert ledger.next_is_complete()


def test_statistics_of_all_rows_are_waited_for():
    ledger = Ledger([task(0, Part(0, (0, 4), (0,)), Part(1, (4, 12), (1,)), whole=True)], 0, Board(1))
    ledger.count(ledger.tasks[0], 0, 4)
    assert not ledger.next_is_complete()
    ledger.count(ledger.tasks[0], 4, 12)
    assert ledger.next_is_complete()


def test_rows_that_come_twice_are_told():
    ledger = Ledger([three(0)], 0, Board(1))
    ledger.count(ledger.tasks[0], 4, 8)
    with pytest.raises(DistquantError, match="rows 4 to 8 of t0 arrived twice"):
        ledger.count(ledger.tasks[0], 4, 8)


def test_unfinished_statistics():
    parts = (Part(0, (0, 12), (0, 1)),)
    ledger = Ledger([task(0, *parts, whole=True), task(1, *parts), task(2, *parts, whole=True)], 0, Board(1))
    each = 12 * 4
    assert [ledger.unfinished_statistics(t) for t in ledger.tasks] == [each, each, 2 * each]
    ledger.count(ledger.tasks[0], 0, 12)
    ledger.finished()
    assert ledger.unfinished_statistics(ledger.tasks[2]) == each


@pytest.mark.parametrize("silent", [1, 2])
@pytest.mark.parametrize("sent", [0, 2])
def test_late_rank_is_named(silent, sent):
    """The one whose rows are missing, also where its first ones did come."""
    ledger = Ledger([three(0)], 0, Board(7))
    for rank in range(3):
        for start in (0, 2):
            if rank != silent or start < sent:
                ledger.count(ledger.tasks[0], 4 * rank + start, 4 * rank + start + 2)
    error = ledger.late()
    assert error.rank == silent
    assert "t0" in str(error)
    assert "7 s" in str(error)
