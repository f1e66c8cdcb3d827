"""Reads that fail, and faults at the time of a read: by a `preadv` of the fork's own in place of the system's."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

Read = Callable[[int, Sequence[memoryview], int], int]


def at_read(number: int, happen: Callable[[], None], run: Callable[[], int]) -> Callable[[], int]:
    """Returns a run during which something happens right before a read of weights, counted from 1."""

    def both() -> int:
        count = 0

        def read(fd: int, targets: Sequence[memoryview], offset: int) -> int:
            nonlocal count
            count += 1
            if count == number:
                happen()
            return os.preadv(fd, targets, offset)

        _install(read)
        return run()

    return both


def before_opening(happen: Callable[[], None], run: Callable[[], int]) -> Callable[[], int]:
    """Returns a run in which something happens when all headers are read, and no file is open for its weights."""

    def both() -> int:
        from distquant.loading.stream.files import Files

        begin = Files.__init__

        def init(self: Files, *arguments: object, **named: object) -> None:
            happen()
            begin(self, *arguments, **named)  # type: ignore[arg-type]

        Files.__init__ = init  # type: ignore[method-assign,assignment]
        return run()

    return both


def _install(read: Read) -> None:
    from distquant.loading.stream.files import Files

    Files._preadv = lambda self, *call: read(*call)  # type: ignore[method-assign]


def _failing(number: int, first: int, times: int | None) -> Callable[[], None]:
    """Returns what makes reads fail with an error: from a read on, some of them (None: all that follow)."""

    def install() -> None:
        count = 0

        def read(fd: int, targets: Sequence[memoryview], offset: int) -> int:
            nonlocal count
            count += 1
            if count >= first and (times is None or count < first + times):
                raise OSError(number, os.strerror(number))
            return os.preadv(fd, targets, offset)

        _install(read)

    return install


def _short(most: int) -> Callable[[], None]:
    """Returns what makes every read bring some bytes at most."""

    def install() -> None:
        def read(fd: int, targets: Sequence[memoryview], offset: int) -> int:
            return os.preadv(fd, (targets[0][:most],), offset)

        _install(read)

    return install


def _ends() -> None:
    """Makes the third read bring nothing, as at a file's end."""
    count = 0

    def read(fd: int, targets: Sequence[memoryview], offset: int) -> int:
        nonlocal count
        count += 1
        return 0 if count == 3 else os.preadv(fd, targets, offset)

    _install(read)


def _probe(number: int, times: int) -> Callable[[], None]:
    """Returns what makes the first direct reads fail, by which it is found out if the file system takes any."""

    def install() -> None:
        count, real = 0, os.preadv

        def read(fd: int, targets: Sequence[memoryview], offset: int, *flags: int) -> int:
            nonlocal count
            if os.get_blocking(fd) and not flags:
                count += 1
                if count <= times:
                    raise OSError(number, os.strerror(number))
            return real(fd, targets, offset, *flags)

        os.preadv = read

    return install


PASSING = (errno.EIO, errno.EAGAIN, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT)
FINAL = (errno.ENOMEM, errno.EACCES, errno.ENXIO, errno.EINVAL)

READS: dict[str, Callable[[], None]] = {
    **{f"{errno.errorcode[number]} once": _failing(number, 2, 1) for number in PASSING},
    **{f"{errno.errorcode[number]} for good": _failing(number, 3, None) for number in (errno.EIO, errno.ESTALE)},
    **{f"{errno.errorcode[number]}": _failing(number, 2, 1) for number in FINAL},
    **{f"at most {most} bytes": _short(most) for most in (4096, 100_000)},
    "nothing comes": _ends,
    **{f"{errno.errorcode[number]} at first": _probe(number, 1) for number in PASSING},
    "EINVAL at first": _probe(errno.EINVAL, 1),
    "EIO at first, for good": _probe(errno.EIO, 1_000_000),
}
"""Name -> what makes reads fail so."""
