"""Torch's number of threads, changed for the calling thread alone.

`torch.set_num_threads` sets two numbers: that of the calling thread, and the one that every thread takes which uses
torch for the first time from then on. The second belongs to the process, so it is put back at once: else a thread that
begins meanwhile (another load's, or autograd's) would stay on one core for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

_LOCK = threading.Lock()

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread: the rounding of sums depends on the number of threads."""
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
    thread.start()
    thread.join()
    return results[0]
