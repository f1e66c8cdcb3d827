"""Allocates memory for loaded weights: in huge pages where these come quickly, else in many small ones at once.

A page fault for each 4 KiB costs more than the write that causes it. Linux gives pages of 2 MiB where it is asked to,
which costs least. But if the machine is a guest whose host has taken free memory back, it must be given again in large
blocks, which is slow. The time that a page takes shows the difference, so one page of several is timed. The others are
allocated when they are first written to, which brings them into the cache. Small pages are allocated in one call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
POPULATE_WRITE = 23
"""Linux' MADV_POPULATE_WRITE, which `mmap` does not name."""

SMALLEST = 1 << 20
"""Bytes from which on memory is mapped separately; the allocator gives anything smaller."""

SLOW = 2e-3
"""Seconds from which on a huge page costs more than as many bytes in small ones."""

SAMPLED = 16
"""Huge pages of which one is timed."""

PAUSE, LONGEST = 16, 1024
"""Huge pages that are skipped after a slow one; twice as many after each that is slow again, up to the longest."""


class Memory:
    """Allocates memory for tensors, and remembers if huge pages are quick. Any thread may call it."""

    def __init__(self) -> None:
        self._asks = hasattr(mmap, "MADV_HUGEPAGE")
        self._pause = PAUSE
        self._left_out = 0
        """Huge pages that are still to be skipped."""
        self._untimed = 0
        """Huge pages that are not timed, before the next that is."""

    def empty(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a new tensor of `count` elements, not initialized; its memory is freed with the last view of it."""
        nbytes = count * dtype.itemsize
        if device.type != "cpu" or nbytes < SMALLEST or not self._asks:
            return torch.empty(count, dtype=dtype, device=device)
        mapped = mmap.mmap(-1, nbytes + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -torch.frombuffer(mapped, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        tensor = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
        try:
            self._take(tensor.data_ptr(), nbytes)
        except OSError:
            self._asks = False  # a Linux without these calls: it allocates pages when they are written to
        return tensor

    def _take(self, address: int, nbytes: int) -> None:
        """Allocates the small pages of memory that begins on a huge page, and asks for huge pages elsewhere."""
        done, end = 0, nbytes // HUGE_PAGE * HUGE_PAGE
        while done < end:
            # After a slow huge page, use small ones for a while: the host may be about to take more memory back.
            left_out = min(self._left_out * HUGE_PAGE, end - done)
            if left_out > 0:
                _advise(address + done, left_out, POPULATE_WRITE)
                self._left_out -= left_out // HUGE_PAGE
                done += left_out
                continue
            timed = self._untimed <= 0
            here = HUGE_PAGE if timed else min(self._untimed * HUGE_PAGE, end - done)
            _advise(address + done, here, mmap.MADV_HUGEPAGE)
            if timed:
                begun = time.thread_time()  # not the time of other threads on the same core
                _advise(address + done, here, POPULATE_WRITE)
                self._took(time.thread_time() - begun)
            else:
                self._untimed -= here // HUGE_PAGE
            done += here
        if done < nbytes:
            _advise(address + done, nbytes - done, POPULATE_WRITE)

    def _took(self, seconds: float) -> None:
        """Counts a huge page that was timed."""
        if seconds < SLOW:
            self._pause, self._untimed = PAUSE, SAMPLED - 1
        else:
            self._left_out, self._pause = self._pause, min(2 * self._pause, LONGEST)


MEMORY = Memory()
"""One for the process: what one load measures about huge pages holds for the next."""


@cache
def _libc(locked: bool) -> ctypes.CDLL:
    return (ctypes.PyDLL if locked else ctypes.CDLL)(None, use_errno=True)


def _advise(address: int, nbytes: int, advice: int) -> None:
    """Calls madvise(2). Releases Python's lock only to allocate pages: to get it back costs more than other calls."""
    libc = _libc(advice != POPULATE_WRITE)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_int(advice)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
