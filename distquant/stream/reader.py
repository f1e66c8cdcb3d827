"""Streams rows of files through reusable buffers, ahead of the consumer and never further than the budget.

One thread reads with `preadv` (which releases the GIL) into a ring of buffers; the consumer takes them in order and
gives them back. A buffer holds whole row steps of one tensor. Nothing is mapped into memory.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distquant.errors import DistquantError
from distquant.stream.rows import RowRange

BUFFERS = 3
"""Buffers in the ring: one being read, one waiting, one being quantized."""

CHUNK = 8 << 20
"""Bytes per buffer where the budget allows: large enough for the disk, small enough for the cache."""


AHEAD = 16
"""Pieces that may wait for the consumer. Those in buffers are fewer; these limit what is read straight into place."""

PATIENCE = 0.1
"""Seconds between looks whether the reader is to stop."""


class ReadError(DistquantError, OSError):
    """A file could not be read as its header says; names file, offset and tensor."""


@dataclass(slots=True)
class Chunk:
    """Consecutive local rows of one task: uint8 `[rows, row bytes]`, valid until the next chunk is asked for.

    `buffer` is None where the rows were read straight into the task's own memory and nothing is left to do with them.
    """

    task: int
    rows: Tensor
    local: int
    dtype: str
    buffer: Tensor | None = None


@dataclass(slots=True)
class ReadStats:
    """What the reader did: `bytes` off the files (waste included), seconds spent reading and waited for."""

    bytes: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    largest: int = 0


@dataclass(slots=True)
class Work:
    """One task's reads: its row ranges, the step that its pieces must keep, and the row bytes that set their size."""

    ranges: list[RowRange]
    row_step: int = 1
    pace: int = 0
    """Bytes a row counts for when pieces are sized; the same on every rank where pieces must match. 0 = its own."""
    into: Tensor | None = None
    """uint8 `[local rows, row bytes]`: finished memory that rows are read into without passing through a buffer."""


@dataclass
class Reader:
    """Reads tasks in order. Use as a context manager: leaving it stops the thread and closes the files."""

    folder: Path
    budget: int
    stats: ReadStats = field(default_factory=ReadStats)

    def __post_init__(self) -> None:
        self._files: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    @property
    def chunk_bytes(self) -> int:
        return max(min(self.budget // BUFFERS, CHUNK), 1)

    def stream(self, works: Iterable[Work]) -> Iterator[Chunk]:
        """Yields the chunks of all tasks, in order; each is valid until the next is taken."""
        free: queue.Queue[Tensor] = queue.Queue()
        ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(AHEAD)
        for _ in range(BUFFERS):
            free.put(torch.empty(0, dtype=torch.uint8))
        self._thread = threading.Thread(
            target=self._produce, args=(works, free, ready), name="distquant-reader", daemon=True
        )
        self._thread.start()
        while True:
            start = time.perf_counter()
            item = ready.get()
            self.stats.waited += time.perf_counter() - start
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.buffer is not None:
                free.put(item.buffer)

    def _produce(self, works: Iterable[Work], free: queue.Queue[Tensor], ready: queue.Queue) -> None:
        try:
            for task, work in enumerate(works):
                for piece in self._pieces(work):
                    if work.into is not None:
                        if self._stop.is_set():
                            return
                        rows = work.into[piece.local : piece.local + piece.rows]
                        self.read_rows(piece, rows.view(-1))
                        self._hand(ready, Chunk(task, rows, piece.local, piece.dtype))
                        continue
                    buffer = self._take(free)
                    if buffer is None:
                        return
                    self._hand(ready, self._fill(task, piece, buffer))
            self._hand(ready, None)
        except BaseException as error:  # handed to the consumer, which raises it
            self._hand(ready, error)

    def _take(self, free: queue.Queue[Tensor]) -> Tensor | None:
        while not self._stop.is_set():
            try:
                return free.get(timeout=PATIENCE)
            except queue.Empty:
                continue
        return None

    def _hand(self, ready: queue.Queue[Any], item: Chunk | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                ready.put(item, timeout=PATIENCE)
            except queue.Full:
                continue
            return

    def _pieces(self, work: Work) -> Iterator[RowRange]:
        for whole in work.ranges:
            pace = work.pace or whole.row_bytes
            most = max(self.chunk_bytes // max(pace, 1) // work.row_step, 1) * work.row_step
            for first in range(0, whole.rows, most):
                yield whole.part(first, min(most, whole.rows - first))

    def _fill(self, task: int, piece: RowRange, buffer: Tensor) -> Chunk:
        needed = piece.nbytes
        if buffer.numel() < needed:
            buffer = torch.empty(max(needed, min(self.chunk_bytes, CHUNK)), dtype=torch.uint8)
            self.stats.largest = max(self.stats.largest, buffer.numel())
        view = buffer[:needed]
        self.read_rows(piece, view)
        return Chunk(task, view.view(piece.rows, -1), piece.local, piece.dtype, buffer)

    def read_rows(self, piece: RowRange, into: Tensor) -> None:
        """Reads a row range into a contiguous uint8 tensor of its size."""
        start = time.perf_counter()
        target = memoryview(into.numpy().data)
        width = piece.keep[1] - piece.keep[0]
        if width == piece.row_bytes:
            self._pread(piece, piece.offset, target)
        else:
            fd, at = self._open(piece.file), piece.offset + piece.keep[0]
            for first in range(0, piece.rows * width, width):
                row = target[first : first + width]
                if os.preadv(fd, (row,), at) == width:
                    self.stats.bytes += width
                else:
                    self._pread(piece, at, row)  # short: once more from its start, with the loop that tells why
                at += piece.row_bytes
        self.stats.seconds += time.perf_counter() - start

    def _pread(self, piece: RowRange, offset: int, target: memoryview) -> None:
        fd = self._open(piece.file)
        done = 0
        while done < len(target):
            try:
                count = os.preadv(fd, [target[done:]], offset + done)
            except OSError as error:
                raise ReadError(f"{piece.file} at byte {offset + done} ({piece.tensor}): {error.strerror}") from error
            if count == 0:
                what = f"the file ends {len(target) - done} bytes too early"
                raise ReadError(f"{piece.file} at byte {offset + done} ({piece.tensor}): {what}")
            done += count
        self.stats.bytes += done

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                try:
                    self._files[file] = os.open(self.folder / file, os.O_RDONLY)
                except OSError as error:
                    raise ReadError(f"{self.folder / file}: {error.strerror}") from error
            return self._files[file]
