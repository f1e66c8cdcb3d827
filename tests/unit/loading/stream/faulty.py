"""Files whose reads fail on purpose: short, late, with errors, or counted byte by byte."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from distquant.loading.stream.files import Files
from distquant.planning.slots import PAGE

SIZE = 5 * PAGE + 123
"""Bytes of `data.bin`, the file that most tests read."""

END = "end"
"""The file is found to end here."""


class Short(int):
    """A read that gives at most so many bytes."""


class Faulty(Files):
    """Every read takes the next outcome of a script: a `Short`, an errno, `END`, or None for an honest read.

    After the script all reads are honest. `asked` lists (offset, bytes wanted) of every read.
    """

    def __init__(self, folder: Path, mode: str = "buffered", script: Iterable[object] = ()):
        super().__init__(folder, mode)
        self.script = iter(script)
        self.asked: list[tuple[int, int]] = []

    def _preadv(self, fd: int, targets: Sequence[memoryview], offset: int) -> int:
        self.asked.append((offset, sum(map(len, targets))))
        outcome = next(self.script, None)
        if outcome is None:
            return super()._preadv(fd, targets, offset)
        if outcome is END:
            return 0
        if isinstance(outcome, Short):
            return super()._preadv(fd, shortened(targets, max(int(outcome), 1)), offset)
        assert isinstance(outcome, int)
        raise OSError(outcome, os.strerror(outcome))


class Counting(Files):
    """Counts how often each byte of each file is handed out; reads are late, short or fail for a while, at random.

    Args:
        folder: of the files.
        counters: file -> one counter a byte, shared by the ranks of a node.
        seed: of what happens.
        delay: seconds that a read may take.
        short: whether reads may be short.
        hook: called before every read.
    """

    def __init__(
        self,
        folder: Path,
        counters: dict[str, np.ndarray],
        seed: int = 0,
        delay: float = 0.0,
        short: bool = False,
        hook: Callable[[], None] | None = None,
        mode: str = "buffered",
    ):
        super().__init__(folder, mode)
        self._counters, self._delay, self._short, self._hook = counters, delay, short, hook
        self._random, self._guard, self._here = random.Random(seed), threading.Lock(), threading.local()

    def _preadv(self, fd: int, targets: Sequence[memoryview], offset: int) -> int:
        if self._hook is not None:
            self._hook()
        with self._guard:
            late, failing, short, share = (self._random.random() for _ in range(4))
        if late < 0.3:
            time.sleep(self._delay * late)
        self._fail_at_times(failing)
        if self._short and short < 0.15:
            targets = shortened(targets, self._less(sum(map(len, targets)), share))
        count = super()._preadv(fd, targets, offset)
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        with self._guard:
            self._counters[name][offset : offset + count] += 1
        return count

    def _fail_at_times(self, chance: float) -> None:
        """Never twice in a row on one thread, so no read fails for good."""
        failed = getattr(self._here, "failed", False)
        self._here.failed = chance < 0.04 and not failed
        if self._here.failed:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _less(self, length: int, share: float) -> int:
        if self.mode == "direct":
            return max(int(length * share) // PAGE, 1) * PAGE
        return max(int(length * share), 1)


def shortened(targets: Sequence[memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes of the targets."""
    found = []
    for target in targets:
        found.append(target[:length])
        length -= len(found[-1])
    return [target for target in found if len(target)]


def run(files: Files, offset: int, lengths: Iterable[int]) -> bytes:
    targets = [bytearray(length) for length in lengths]
    names = [f"{'some' if number == 0 else number}.weight" for number in range(len(targets))]
    files.read_run("data.bin", offset, [memoryview(target) for target in targets], names)
    return b"".join(targets)


def buffered(files: Files, offset: int, count: int) -> bytes:
    target = bytearray(count)
    files.read_run("data.bin", offset, [memoryview(target)], ["some.weight"])
    return bytes(target)


def rows(files: Files, offset: int, stride: int, width: int, count: int) -> bytes:
    target = bytearray(width * count)
    files.read_rows("data.bin", offset, stride, memoryview(target), width, "some.weight")
    return bytes(target)


def span(files: Files, offset: int, count: int, slot: torch.Tensor) -> bytes:
    if not files.is_direct("data.bin"):
        return buffered(files, offset, count)
    slot.zero_()
    return files.read_span("data.bin", offset, count, slot, "some.weight").numpy().tobytes()
