"""Torch's number of threads, changed for the calling thread alone.

`torch.set_num_threads` sets two numbers: that of the calling thread, and the one that every thread takes which uses
torch for the first time from then on. The second belongs to the process, so it is put back at once: else a thread that
begins meanwhile (another load's, or autograd's) would stay on one core for ever.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

from distquant.threads import start_thread

_LOCK = threading.Lock()

T = TypeVar("T")


def on_one_thread(function: Callable[[], T]) -> T:
    """Calls a function where torch computes on one thread: the rounding of sums depends on the number of threads."""
    if torch.get_num_threads() == 1:
        return function()
    # Changing this thread's number and back takes half a millisecond, and each nested weight would pay it.
    return _worker(os.getpid()).submit(function).result()


@cache
def _worker(process: int) -> ThreadPoolExecutor:
    """Returns a thread that computes on one thread for good. A forked process needs its own: threads do not survive."""
    return ThreadPoolExecutor(1, "one-thread", initializer=set_own_threads, initargs=(1,))


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread until the end of the block."""
    before = set_own_threads(1)
    try:
        yield
    finally:
        set_own_threads(before)


def set_own_threads(count: int) -> int:
    """Sets the number of threads that the calling thread computes on; returns the one before."""
    with _LOCK:
        of_new_threads = _in_a_new_thread(torch.get_num_threads)
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        if count != of_new_threads:
            _in_a_new_thread(lambda: torch.set_num_threads(of_new_threads))
    return before


def _in_a_new_thread(function: Callable[[], T]) -> T:
    """Calls a function on a thread for which torch has no number yet, and so takes the process's."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    start_thread(thread)
    thread.join()
    return results[0]
