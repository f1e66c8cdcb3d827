"""The state that all threads of a load share: one condition, the first error, and how much has arrived."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from distquant import activity
from distquant.errors import RankError
from distquant.parallel.comm import MISSED

LOOK = 1.0
"""Seconds between two looks at the other ranks while a thread waits."""


def nobody_is_silent(seconds: float | None = None) -> RankError | None:
    """Stands for the ranks' signs of life where there are none to see."""
    return None


class LoadState:
    """One condition for everything that threads of a load wait for, and the first error on any of them.

    Args:
        timeout: seconds that a thread waits while nothing arrives.
        silent: returns the error that names a rank that is silent, as `Comm.silent` does.
    """

    def __init__(self, timeout: float, silent: Callable[[float | None], RankError | None] = nobody_is_silent):
        self.watch = threading.Condition()
        self.timeout, self.silent = timeout, silent
        self.arrivals = 0
        """Arrivals so far, of any tensor: a thread that waits does not give up while this grows."""
        self.failure: BaseException | None = None
        self.stopped = False

    def fail(self, error: BaseException) -> None:
        """Records an error, unless there is one, and wakes all threads that wait."""
        with self.watch:
            if self.failure is None:
                self.failure = error
            self.watch.notify_all()

    def stop(self) -> None:
        """Ends all threads that wait."""
        with self.watch:
            self.stopped = True
            self.watch.notify_all()

    def wait(
        self,
        ready: Callable[[], bool],
        late: Callable[[], BaseException],
        doing: Callable[[], str] = lambda: "waiting for other ranks",
    ) -> bool:
        """Waits, with the condition held, until `ready`; returns False if the load was stopped meanwhile.

        Raises the first error on any thread; and when nothing has arrived for the timeout, the error of a rank that is
        silent, or else `late()`. `doing` describes the wait, for other ranks.
        """
        arrivals, since, before = self.arrivals, time.monotonic(), ""
        try:
            while True:
                left = since + self.timeout - time.monotonic()
                done = self.watch.wait_for(
                    lambda: ready() or self.stopped or self.failure is not None, max(min(LOOK, left), 0)
                )
                if self.failure is not None:
                    raise self.failure
                if done:
                    return not self.stopped
                if (silent := self.silent(None)) is not None:
                    raise silent
                if self.arrivals != arrivals:
                    # The timeout limits silence, not work: a slow rank whose rows keep arriving is not late.
                    arrivals, since = self.arrivals, time.monotonic()
                elif time.monotonic() >= since + self.timeout:
                    raise self.silent(MISSED) or late()
                previous = activity.enter(doing())
                before = before or previous
        finally:
            if before:
                activity.enter(before)
