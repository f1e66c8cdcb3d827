"""Reads bytes of checkpoint files: explicitly, through the page cache or past it, and again after passing errors.

A file whose pages are mostly in memory is read through the page cache. Any other is read with O_DIRECT, which saves a
copy and leaves the machine's memory to others. A sample of its pages decides, once for each file. Nothing is read
through a mapping, so a file on a network may vanish without a crash.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from distquant.errors import DistquantError, InputError
from distquant.files import open_file
from distquant.planning.slots import PAGE

RETRIED = frozenset((errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EINTR))
"""Errors of a disk or network that may pass; any other is final at once."""

PAUSES = (0.05, 0.2, 0.8)
"""Seconds before each new try."""

MOST_TARGETS = 1024
"""Targets that one read may fill (Linux' IOV_MAX)."""

SAMPLES = 32
"""Pages of a file that are looked for in memory."""

RESIDENT = 0.5
"""Share of them from which on a file is read through the page cache."""


class ReadError(DistquantError, OSError):
    """A file could not be read as its header says; names file, offset and tensor."""


@dataclass(slots=True)
class ReadStats:
    """Bytes read from files (waste included), by mode; calls, and how often a read was tried again."""

    bytes: int = 0
    direct: int = 0
    calls: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def count(self, nbytes: int, direct: bool, calls: int = 1) -> None:
        with self._lock:
            self.bytes += nbytes
            self.direct += nbytes * direct
            self.calls += calls

    def count_retry(self) -> None:
        with self._lock:
            self.retries += 1


class Files:
    """The open files of a checkpoint folder. Threads may read at the same time; `close` when none does any more."""

    def __init__(self, folder: Path, mode: str = "auto"):
        self.folder, self.mode = folder, mode
        self.stats = ReadStats()
        self._open: dict[tuple[str, bool], int] = {}
        self._direct: dict[str, bool] = {}
        self._lock = threading.Lock()
        self._stale: list[int] = []
        """Handles that the server no longer knows; closed at the end, as another thread may still read with them."""

    def close(self) -> None:
        """Closes all files."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()
        while self._stale:
            os.close(self._stale.pop())

    def is_direct(self, file: str) -> bool:
        """Returns True if a file is read past the page cache; decided at its first read."""
        with self._lock:
            if file not in self._direct:
                self._direct[file] = self._decide(file)
            return self._direct[file]

    def in_memory(self, file: str) -> bool:
        """Returns True if a file is read through the page cache because its pages are there."""
        return self.mode == "auto" and not self.is_direct(file)

    def read_run(self, file: str, offset: int, targets: Sequence[memoryview], tensors: Sequence[str]) -> None:
        """Fills targets one after the other from a byte offset on, through the page cache.

        Args:
            file: of the folder.
            offset: of the first byte.
            targets: any number of them; up to `MOST_TARGETS` are filled by one call.
            tensors: name of each target's tensor, for messages.
        """
        for first in range(0, len(targets), MOST_TARGETS):
            together = targets[first : first + MOST_TARGETS]
            nbytes = sum(map(len, together))
            self._fill(file, offset, together, tensors[first:], False, nbytes)
            self.stats.count(nbytes, False)
            offset += nbytes

    def read_rows(self, file: str, offset: int, stride: int, target: memoryview, width: int, tensor: str) -> None:
        """Fills `target` with `width` bytes from every `stride`, through the page cache."""
        # The common case in few operations: such reads are small and many, and `_fill` costs more than they do.
        fd = self._fd(file, False)
        for begin in range(0, len(target), width):
            row = target[begin : begin + width]
            try:
                count = self._preadv(fd, (row,), offset)
            except OSError:
                count = -1
            if count != width:
                # Short, or failed: read once more from its start, by the loop that tries again and reports errors.
                self._fill(file, offset, (row,), (tensor,), False, width)
                fd = self._fd(file, False)
            offset += stride
        self.stats.count(len(target), False, len(target) // max(width, 1))

    def read_span(self, file: str, offset: int, count: int, slot: Tensor, tensor: str) -> Tensor:
        """Reads `count` bytes into a slot on a page boundary, past the page cache.

        The slot has `planning.slots.SLACK` bytes to spare.

        Returns:
            uint8 `[count]`: the part of the slot that holds them.
        """
        before = offset % PAGE
        length = -(-(before + count) // PAGE) * PAGE
        target = memoryview(slot[:length].numpy().data)
        done = self._fill(file, offset - before, (target,), (tensor,), True, before + count)
        self.stats.count(done, True)
        return slot[before : before + count]

    def _fill(
        self,
        file: str,
        offset: int,
        targets: Sequence[memoryview],
        tensors: Sequence[str],
        direct: bool,
        needed: int,
    ) -> int:
        """Reads until `needed` bytes are there; returns how many are: more, where targets and file have more."""
        done, tries, reached = 0, 0, -1
        while done < needed:
            rest = _after(targets, done)
            where = f"{file} at byte {offset + done} ({tensors[len(targets) - len(rest)]})"
            try:
                count = self._preadv(self._fd(file, direct), rest, offset + done)
            except ReadError:
                raise
            except OSError as error:
                if error.errno not in RETRIED or tries == len(PAUSES):
                    again = f", after {tries} new tries" if tries else ""
                    raise ReadError(f"{where}: {error.strerror}{again}") from error
                time.sleep(PAUSES[tries])
                tries += 1
                self.stats.count_retry()
                if error.errno == errno.ESTALE:
                    self._forget(file, direct)
                continue
            if count == 0:
                raise ReadError(f"{where}: the file ends {needed - done} bytes too early")
            done += count
            if direct and done < needed:
                # The end of a file within a page gives the same short read again and again: no progress is an end.
                if done <= reached:
                    where = f"{file} at byte {offset + done} ({tensors[0]})"
                    raise ReadError(f"{where}: the file ends {needed - done} bytes too early")
                reached = done
                done = done // PAGE * PAGE  # the next direct read must start on a page
        return done

    def _preadv(self, fd: int, targets: Sequence[memoryview], offset: int) -> int:
        """Reads once; tests replace it by a read that fails."""
        return os.preadv(fd, targets, offset)

    def _fd(self, file: str, direct: bool) -> int:
        with self._lock:
            return self._descriptor(file, direct)

    def _descriptor(self, file: str, direct: bool) -> int:
        key = (file, direct)
        if key not in self._open:
            try:
                self._open[key] = open_file(self.folder / file, os.O_DIRECT if direct else 0)
            except OSError as error:
                raise ReadError(f"{self.folder / file}: {error.strerror}") from error
        return self._open[key]

    def _forget(self, file: str, direct: bool) -> None:
        """Puts aside a handle that the server no longer knows; the next read opens the file again."""
        with self._lock:
            fd = self._open.pop((file, direct), None)
            if fd is not None:
                self._stale.append(fd)

    def _decide(self, file: str) -> bool:
        if self.mode == "buffered" or not hasattr(os, "O_DIRECT"):
            return False
        if self.mode == "auto" and resident_share(self._descriptor(file, False)) >= RESIDENT:
            return False
        try:
            self._probe(self._descriptor(file, True))
        except (OSError, ReadError) as error:
            if self.mode == "direct":
                problem = f"{self.folder / file} cannot be read with O_DIRECT ({error})"
                raise InputError.one("io", problem, "Use io='auto' or 'buffered'") from error
            return False
        return True

    @staticmethod
    def _probe(fd: int) -> None:
        """Raises OSError where the file system does not take direct reads."""
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(fd, (page,), 0)


def _after(targets: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """Returns the rest of targets whose first `done` bytes are filled, but not all; its first target is not empty."""
    for number, target in enumerate(targets):
        if done < len(target):
            return [target[done:], *targets[number + 1 :]] if done else targets[number:]
        done -= len(target)
    raise AssertionError("all targets are filled")


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
