"""Finds out how much of a file is in the page cache, without reading it."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from contextlib import suppress

import numpy as np

SAMPLES = 32
"""Pages of a file that are looked for in memory."""


def resident_share(fd: int) -> float:
    """Returns the share of a file's pages that are in memory, from a random sample; 1.0 if the system cannot tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 1.0
    size = os.fstat(fd).st_size
    offsets = [random.randrange(max(size, 1)) // mmap.PAGESIZE * mmap.PAGESIZE for _ in range(SAMPLES)]
    if size and _may_ask(fd):
        with suppress(OSError):  # some file systems cannot be mapped
            return sum(_resident(fd, size, offsets)) / SAMPLES
    return sum(_answers_at_once(fd, offset) for offset in offsets) / SAMPLES


def _may_ask(fd: int) -> bool:
    """Returns True if the kernel answers mincore(2) for a file: only to its owner, and to those who may write it."""
    return os.fstat(fd).st_uid == os.geteuid() or os.access(f"/proc/self/fd/{fd}", os.W_OK)


def _resident(fd: int, size: int, offsets: list[int]) -> list[bool]:
    """Asks mincore(2), which reads nothing, about pages of a mapping that is never touched."""
    libc, page = ctypes.CDLL(None, use_errno=True), ctypes.c_ubyte()
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        resident = []
        for offset in offsets:
            if libc.mincore(ctypes.c_void_p(start + offset), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(page)):
                raise OSError(ctypes.get_errno(), "mincore")
            resident.append(bool(page.value & 1))
    return resident


def _answers_at_once(fd: int, offset: int) -> bool:
    """Tries a read that may not wait. The kernel begins it all the same, so a very fast disk looks like memory."""
    try:
        return bool(os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return True
