"""Which rows of which tensors have arrived, and in what order tensors are finished: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from distquant.errors import DistquantError, RankError
from distquant.loading.stream.staging_buffer import LoadState
from distquant.loading.stream.tasks import Task


class ArrivalTracker:
    """Counts the rows of every tensor that come to a rank, each once. Threads may count at the same time."""

    def __init__(self, tasks: Sequence[Task], rank: int, load_state: LoadState):
        self.tasks, self.rank, self.load_state = tasks, rank, load_state
        self.next = 0
        """The first tensor that is not finished."""
        self._missing = [task.expected(rank) for task in tasks]
        self._came: list[dict[int, int]] = [{} for _ in tasks]
        """Rows that have come, first -> last, of each tensor in work."""

    def count(self, task: Task, start: int, stop: int) -> None:
        """Rows `[start, stop)` are in their place."""
        with self.load_state.watch:
            if start in self._came[task.index]:
                raise DistquantError(f"rows {start} to {stop} of {task.name} arrived twice")
            self._came[task.index][start] = stop
            self.load_state.beats += 1
            self._missing[task.index] -= stop - start
            if self._missing[task.index] == 0:
                self.load_state.watch.notify_all()

    @property
    def ended(self) -> bool:
        return self.next == len(self.tasks)

    def next_is_complete(self) -> bool:
        return not self.ended and self._missing[self.next] == 0

    def finished(self) -> None:
        """The next tensor is finished."""
        self._came[self.next].clear()
        self.next += 1

    def await_next(self) -> None:
        """Waits until the next tensor to finish is complete."""
        with self.load_state.watch:
            self.load_state.wait(self.next_is_complete, self.late)

    def unfinished_statistics(self, task: Task) -> int:
        """Bytes of the statistics of all tensors from the next to finish up to this one."""
        return sum(each.statistics_bytes for each in self.tasks[self.next : task.index + 1])

    def late(self) -> RankError:
        """Names a rank whose rows have not come."""
        task = self.tasks[min(self.next, len(self.tasks) - 1)]
        came = self._came[task.index]
        rank = self.rank
        for part in task.reads:
            first, last = part.rows
            there = sum(stop - start for start, stop in came.items() if first <= start < last)
            if part.reader != self.rank and there < last - first:
                rank = part.reader
                break
        return RankError(rank, f"sent no rows of {task.name} to rank {self.rank} for {self.load_state.timeout:g} s")
