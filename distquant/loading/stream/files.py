"""Reads bytes of checkpoint files: explicitly, through the page cache or past it, and again after passing errors.

A file whose pages are mostly in memory is read through the page cache. Any other is read with O_DIRECT, which saves a
copy and leaves the machine's memory to others. A sample of its pages decides, once for each file. Nothing is read
through a mapping, so a file on a network may vanish without a crash. (What `loading.mapped` maps is not read.)
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from distquant.errors import DistquantError, InputError
from distquant.files import open_file
from distquant.loading.stream.page_cache import resident_share
from distquant.planning.slots import PAGE
from distquant.stamps import Stamp

RETRIED = frozenset((errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EINTR))
"""Errors of a disk or network that may pass; any other is final at once."""

PAUSES = (0.05, 0.2, 0.8)
"""Seconds before each new try."""

MOST_TARGETS = 1024
"""Targets that one read may fill (Linux' IOV_MAX)."""

UNSUPPORTED = frozenset((errno.EINVAL, errno.EOPNOTSUPP))
"""Errors by which a file system says that it takes no direct reads."""

RESIDENT = 0.5
"""Share of a file's pages in memory from which on a file is read through the page cache."""


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
    """The open files of a checkpoint folder. Threads may read at the same time; `close` when none does any more.

    Args:
        folder: that holds the files.
        mode: `auto`, `buffered` or `direct`; `mapped` reads what is not mapped as `auto` does.
        stamps: file -> what the system said of it when its header was read. It must say the same when the file is
            opened, and at the end (`check_unchanged`). A file that is not in it is not compared.
    """

    def __init__(self, folder: Path, mode: str = "auto", stamps: Mapping[str, Stamp] | None = None):
        self.folder, self.mode = folder, "auto" if mode == "mapped" else mode
        self._stamps = stamps or {}
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

    def open(self, file: str) -> int:
        """Opens a file, as its first read would; returns its descriptor, which stays this object's."""
        return self._fd(file, False)

    def check_unchanged(self) -> None:
        """Raises ReadError if bytes of a file that has been read may be others than when its header was read."""
        for (file, _), fd in self._open.items():
            self._compare(file, fd)

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
                self._compare(file, self._fd(file, direct))  # why it ends, if that is known
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
        try:
            return self._again(lambda: self._opened(file, direct))
        except ReadError:
            raise
        except OSError as error:
            raise ReadError(f"{self.folder / file}: {error.strerror}") from error

    def _opened(self, file: str, direct: bool) -> int:
        key = (file, direct)
        if key not in self._open:
            fd = open_file(self.folder / file, os.O_DIRECT if direct else 0)
            try:
                self._compare(file, fd)
            except ReadError:
                os.close(fd)
                raise
            self._open[key] = fd
        return self._open[key]

    def _compare(self, file: str, fd: int) -> None:
        """Raises ReadError if an open file's bytes may be others than when its header was read."""
        before = self._stamps.get(file)
        change = None if before is None else before.change(_stamp(fd))
        if change is not None:
            fault = f"{self.folder / file}: the file was changed after its header was read ({change})"
            raise ReadError(f"{fault}. Load again when nothing writes to it")

    def _again(self, call: Callable[[], int]) -> int:
        """Returns what a call returns, called again after passing errors."""
        for pause in PAUSES:
            try:
                return call()
            except OSError as error:
                if error.errno not in RETRIED:
                    raise
            time.sleep(pause)
            self.stats.count_retry()
        return call()

    def _forget(self, file: str, direct: bool) -> None:
        """Puts aside a handle that the server no longer knows; the next read opens the file again."""
        with self._lock:
            fd = self._open.pop((file, direct), None)
            if fd is not None:
                self._stale.append(fd)

    def _decide(self, file: str) -> bool:
        if self.mode == "buffered" or not hasattr(os, "O_DIRECT"):
            return False
        # Opened in either mode: what is wrong with the file itself is not a matter of direct reads.
        through = self._descriptor(file, False)
        if self.mode == "auto" and resident_share(through) >= RESIDENT:
            return False
        try:
            self._again(lambda: self._probe(self._opened(file, True)))
        except ReadError:
            raise
        except OSError as error:
            if self.mode == "auto":
                return False  # if the disk itself fails, reads through the page cache will say so
            if error.errno not in UNSUPPORTED:
                again = f", after {len(PAUSES)} new tries" if error.errno in RETRIED else ""
                raise ReadError(f"{self.folder / file} at byte 0: {error.strerror}{again}") from error
            problem = f"{self.folder / file} cannot be read with O_DIRECT ({error.strerror})"
            raise InputError.one("io", problem, "Use io='auto' or 'buffered'") from error
        return True

    @staticmethod
    def _probe(fd: int) -> int:
        """Reads a file's first page; raises OSError where the file system does not take direct reads."""
        with mmap.mmap(-1, PAGE) as page:
            return os.preadv(fd, (page,), 0)


def _stamp(fd: int) -> Stamp:
    """Returns what the system says of an open file now.

    Over a network it may answer from memory. Opening the file anew makes it ask the server.
    """
    try:
        anew = open_file(f"/proc/self/fd/{fd}")
    except OSError:  # not everywhere, and not of a file that may no longer be read
        return Stamp.of(fd)
    try:
        return Stamp.of(anew)
    finally:
        os.close(anew)


def _after(targets: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """Returns the rest of targets whose first `done` bytes are filled, but not all; its first target is not empty."""
    for number, target in enumerate(targets):
        if done < len(target):
            return [target[done:], *targets[number + 1 :]] if done else targets[number:]
        done -= len(target)
    raise AssertionError("all targets are filled")
