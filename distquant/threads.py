"""Starts threads where memory may be short: Python waits forever for a thread that has none for its first steps."""

from __future__ import annotations

import mmap
import resource
import threading

STACK = 8 << 20
"""Bytes of a thread's stack where the system names no limit (Linux' default)."""

FIRST_STEPS = 4 << 20
"""Bytes that a new thread may need before it says that it runs."""


def start_thread(thread: threading.Thread) -> None:
    """Starts a thread; raises OSError (ENOMEM) or RuntimeError where it cannot.

    The C library may have a stack left over from another thread, so the start itself does not show that memory is out.
    """
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    size = (STACK if stack == resource.RLIM_INFINITY else min(stack, STACK)) + FIRST_STEPS
    mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()  # never touched, so it costs no memory
    thread.start()
