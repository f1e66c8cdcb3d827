"""Pauses garbage collection while many long-lived objects are created."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class _Paused:
    """Pauses of the collector, which belongs to the whole process."""

    count: int = 0
    """Pauses of all threads that have not ended."""
    enabled: bool = True
    """True if it ran before the first of them."""
    lock: threading.Lock = field(default_factory=threading.Lock)


_PAUSED = _Paused()


@contextmanager
def without_collector() -> Iterator[None]:
    """Pauses the collector until the last thread that asked for it leaves.

    Headers, plans and modules are kept, and the collector would traverse them (and all of torch) again and again. That
    takes a third of the time of planning for 90,000 tensors.
    """
    with _PAUSED.lock:
        if _PAUSED.count == 0:
            _PAUSED.enabled = gc.isenabled()
            gc.disable()
        _PAUSED.count += 1
    try:
        yield
    finally:
        with _PAUSED.lock:
            _PAUSED.count -= 1
            if _PAUSED.count == 0 and _PAUSED.enabled:
                gc.enable()
