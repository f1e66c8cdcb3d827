"""The sinks of tensors in progress: the memory that their rows end in."""

from __future__ import annotations

import threading
from collections.abc import Callable

from distquant.loading.stream.tasks import Sink, Task


class Sinks:
    """Makes the sink of a tensor when its first rows come, on whatever thread that is, and keeps it until `drop`."""

    def __init__(self, make: Callable[[Task], Sink]):
        self._make = make
        self._sinks: dict[int, Sink] = {}
        self._lock = threading.Lock()

    def of(self, task: Task) -> Sink:
        with self._lock:
            if task.index not in self._sinks:
                self._sinks[task.index] = self._make(task)
            return self._sinks[task.index]

    def drop(self, task: Task) -> None:
        """Forgets the sink of a finished tensor."""
        with self._lock:
            del self._sinks[task.index]

    def clear(self) -> None:
        """Forgets all sinks; call it when no thread uses them any more."""
        self._sinks.clear()
