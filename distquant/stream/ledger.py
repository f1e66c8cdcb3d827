"""Which rows of which tensors have arrived, and in what order tensors are finished: the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence

from distquant.errors import DistquantError, RankError
from distquant.stream.arena import Board
from distquant.stream.tasks import Task


class Ledger:
    """Counts the rows of every tensor that come to a rank, each once. Threads may count at the same time."""

    def __init__(self, tasks: Sequence[Task], rank: int, board: Board):
        self.tasks, self.rank, self.board = tasks, rank, board
        self.next = 0
        """The first tensor that is not finished."""
        self._missing = [task.expected(rank) for task in tasks]
        self._starts: list[set[int]] = [set() for _ in tasks]

    def count(self, task: Task, start: int, stop: int) -> None:
        """Rows `[start, stop)` are in their place."""
        with self.board.watch:
            if start in self._starts[task.index]:
                raise DistquantError(f"rows {start} to {stop} of {task.name} arrived twice")
            self._starts[task.index].add(start)
            self._missing[task.index] -= stop - start
            if self._missing[task.index] == 0:
                self.board.watch.notify_all()

    @property
    def ended(self) -> bool:
        return self.next == len(self.tasks)

    def next_is_complete(self) -> bool:
        return not self.ended and self._missing[self.next] == 0

    def finished(self) -> None:
        """The next tensor is finished."""
        self._starts[self.next].clear()
        self.next += 1

    def await_next(self) -> None:
        """Waits until the next tensor to finish is complete."""
        with self.board.watch:
            self.board.wait(self.next_is_complete, self.late)

    def unfinished_statistics(self, task: Task) -> int:
        """Bytes of the statistics of all tensors from the next to finish up to this one."""
        return sum(each.statistics_bytes for each in self.tasks[self.next : task.index + 1])

    def late(self) -> RankError:
        """Names a rank whose rows have not come."""
        task = self.tasks[min(self.next, len(self.tasks) - 1)]
        others = [part for part in task.parts if part.reader != self.rank]
        late = [part.reader for part in others if part.rows[0] not in self._starts[task.index]]
        rank = (late or [part.reader for part in others] or [self.rank])[0]
        return RankError(rank, f"sent no rows of {task.name} to rank {self.rank} for {self.board.timeout:g} s")
