"""Too little of something that the machine has: address space, open files, threads, space for files."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

NOBODY = 65534


def as_nobody(run: Callable[[], int]) -> Callable[[], int]:
    """Returns a run by a user who may do little, where this one is root."""

    def both() -> int:
        drop()
        return run()

    return both


def drop() -> None:
    """Becomes a user who may do little, where this one is root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def _limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    resource.setrlimit(what, (value, most))


def _address_space(more: int) -> Callable[[], None]:
    def install() -> None:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _limit(resource.RLIMIT_AS, size + more)

    return install


def _open_files(more: int) -> Callable[[], None]:
    return lambda: _limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1 + more)


def _no_threads() -> None:
    drop()
    _limit(resource.RLIMIT_NPROC, 0)


LIMITS: dict[str, Callable[[], None]] = {
    **{f"{more:,} bytes more of address space": _address_space(more) for more in
       (0, 100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000)},
    **{f"{more} more open files": _open_files(more) for more in (0, 1, 2, 3, 4, 5, 6, 8, 12)},
    "no more threads": _no_threads,
}  # fmt: skip
"""Name -> what sets the limit."""
