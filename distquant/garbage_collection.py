"""Python's garbage collector, at rest while much is made that stays."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class _Paused:
    """Who has paused the collector, which the whole process shares."""

    count: int = 0
    """Times that it has been paused and not yet resumed, by all threads."""
    enabled: bool = True
    """Whether it ran before the first of them."""
    lock: threading.Lock = field(default_factory=threading.Lock)


_PAUSED = _Paused()


@contextmanager
def without_collector() -> Iterator[None]:
    """Lets the collector rest, until the last thread that asked for it leaves.

    What is made of headers, plans and modules stays, and the collector would walk all of it (and all of torch) time and
    again: a third of the time of planning for 90,000 tensors.
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
