"""Ends what still loads in daemon threads when the interpreter ends.

Python up to 3.12 ends a daemon thread as soon as it asks for the interpreter's lock. Where that is inside a C++
destructor, as torch has them, the whole process ends (SIGABRT, "terminate called without an active exception"). So
such threads are asked to leave while Python still works.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 10.0
"""Seconds that threads get to leave. One call into torch or the operating system is not interrupted."""

POLL = 0.01
"""Seconds between two looks at them."""

_at_work: Counter[threading.Thread] = Counter()
_lock = threading.Lock()


@contextmanager
def left_before_the_end() -> Iterator[None]:
    """Raises `SystemExit` within, in a daemon thread, when the interpreter ends meanwhile."""
    thread = threading.current_thread()
    with _lock:
        _at_work[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _at_work[thread] -= 1
            if not _at_work[thread]:
                del _at_work[thread]


def _end() -> None:
    """Asks all other threads at work to leave, and waits for them: only daemon threads are left by now."""
    import ctypes

    deadline = time.monotonic() + PATIENCE
    asked: set[threading.Thread] = set()
    while time.monotonic() < deadline:
        with _lock:
            working = {thread for thread in _at_work if thread is not threading.current_thread()}
        for thread in working - asked:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        asked |= working
        if not any(thread.is_alive() for thread in asked):
            return
        time.sleep(POLL)


atexit.register(_end)
