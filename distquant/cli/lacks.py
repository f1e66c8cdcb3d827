"""Reports what a machine has too little of, in one line: memory, threads, open files, room on a disk.

Any step may meet this, in any library, each with an error of its own. So it is reported where a command ends.
"""

from __future__ import annotations

import errno
import re

from distquant.errors import Problem, one_line

MEMORY = Problem(
    "memory", "this process gets no more memory", "Free some, or raise its limit (ulimit -v, the container's memory)"
)
THREADS = Problem(
    "threads", "this process gets no more threads", "End others, or raise the limit (ulimit -u, the container's pids)"
)
OPEN_FILES = Problem("files", "this process gets no more open files", "Raise the limit (ulimit -n)")
ROOM = Problem("disk", "a file could not be written", "Make room, or set TMPDIR to a folder on a disk that has some")

_NUMBERS = {
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: THREADS,
    errno.EMFILE: OPEN_FILES,
    errno.ENFILE: OPEN_FILES,
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
}

_MESSAGES = (
    (r"can't allocate memory|[Cc]annot allocate memory|not enough memory|failed to map segment", MEMORY),
    (r"can't start new thread|Resource temporarily unavailable|Thread creation failed", THREADS),
    (r"Too many open files", OPEN_FILES),
    (r"No space left on device|Disk quota exceeded", ROOM),
)
"""Messages of errors without a number: of Python's threads, of torch, and of the loader of shared libraries."""


def lack_of(error: BaseException) -> Problem | None:
    """Returns what an error says that the machine has too little of, if that is its cause."""
    if isinstance(error, MemoryError):
        lack: Problem | None = MEMORY
    elif isinstance(error, OSError) and error.errno is not None:
        lack = _NUMBERS.get(error.errno)
    else:
        lack = next((lack for pattern, lack in _MESSAGES if re.search(pattern, str(error))), None)
    if lack is None:
        return None
    place = getattr(error, "filename", None)
    reason = one_line(getattr(error, "strerror", None) or error) + (f": {place}" if place else "")
    return Problem(lack.where, f"{lack.what} ({reason})", lack.fix)
