"""The state that all threads of a load share: one condition, the first error, and how much has arrived."""

from __future__ import annotations

import threading
from collections.abc import Callable


class LoadState:
    """One condition for everything that threads of a load wait for, and the first error on any of them."""

    def __init__(self, timeout: float):
        self.watch = threading.Condition()
        self.timeout = timeout
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

    def wait(self, ready: Callable[[], bool], late: Callable[[], BaseException]) -> bool:
        """Waits, with the condition held, until `ready`; returns False if the load was stopped meanwhile.

        Raises the first error on any thread, and `late()` when nothing has arrived for the timeout.
        """
        while True:
            before = self.arrivals
            done = self.watch.wait_for(lambda: ready() or self.stopped or self.failure is not None, self.timeout)
            if self.failure is not None:
                raise self.failure
            if done:
                return not self.stopped
            # The timeout limits silence, not work: a slow rank whose rows keep arriving is not late.
            if self.arrivals == before:
                raise late()
