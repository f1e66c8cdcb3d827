"""Tracks which rows of which tensors have arrived, and finishes tensors in one order, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from distquant.errors import DistquantError, RankError
from distquant.loading.stream.load_state import LoadState
from distquant.loading.stream.tasks import Task


class ArrivalTracker:
    """Counts the rows of every tensor that come to a rank, each once. Threads may count at the same time."""

    def __init__(self, tasks: Sequence[Task], rank: int, load_state: LoadState):
        self.tasks, self.rank, self.load_state = tasks, rank, load_state
        self.next = 0
        """The first tensor that is not finished."""
        self._missing = [task.expected(rank) for task in tasks]
        self._arrived: list[dict[int, int]] = [{} for _ in tasks]
        """Runs of rows that have arrived, first -> last, of each tensor in progress."""

    def count(self, task: Task, start: int, stop: int) -> None:
        """Counts rows `[start, stop)`, which are in their place."""
        with self.load_state.watch:
            if start in self._arrived[task.index]:
                raise DistquantError(f"rows {start} to {stop} of {task.name} arrived twice")
            self._arrived[task.index][start] = stop
            self.load_state.arrivals += 1
            self._missing[task.index] -= stop - start
            # Threads wait for complete tensors only: to wake them for every piece would cost more than the piece.
            if self._missing[task.index] == 0:
                self.load_state.watch.notify_all()

    @property
    def ended(self) -> bool:
        """True if all tensors are finished."""
        return self.next == len(self.tasks)

    def next_is_complete(self) -> bool:
        """Returns True if all rows of the next tensor to finish have arrived."""
        return not self.ended and self._missing[self.next] == 0

    def finished(self) -> None:
        """Marks the next tensor as finished."""
        self._arrived[self.next].clear()
        self.next += 1

    def await_next(self) -> None:
        """Waits until the next tensor to finish is complete."""
        with self.load_state.watch:
            self.load_state.wait(
                self.next_is_complete, self.late, lambda: f"waiting for rows of {self.tasks[self.next].name}"
            )

    def unfinished_bytes(self, task: Task) -> int:
        """Returns the bytes that all tensors from the next to finish up to this one take until they are finished."""
        return sum(each.unfinished_bytes for each in self.tasks[self.next : task.index + 1])

    def late(self) -> RankError:
        """Returns an error that names a rank whose rows have not arrived."""
        task = self.tasks[min(self.next, len(self.tasks) - 1)]
        arrived = self._arrived[task.index]
        rank = self.rank
        for part in task.reads:
            first, last = part.rows
            count = sum(stop - start for start, stop in arrived.items() if first <= start < last)
            if part.reader != self.rank and count < last - first:
                rank = part.reader
                break
        return RankError(rank, f"sent no rows of {task.name} to rank {self.rank} for {self.load_state.timeout:g} s")
