"""Opens regular files only, up to a limit: reading a pipe or a device may never end.

Links are followed: files of the Hugging Face cache are links to regular files. Errors are `OSError`s with a `strerror`,
as the system's own are.
"""

from __future__ import annotations

import errno
import io
import os
import stat

MIB = 1 << 20

CONFIG_BYTES = 32 * MIB
"""Of config.json and its like, and of a quantization configuration; one that lists 90,000 modules has 6 MB."""
INDEX_BYTES = 256 * MIB
"""Of model.safetensors.index.json; that of 90,427 tensors has 9 MB."""
TOKENIZER_BYTES = 512 * MIB
"""Of each of a tokenizer's files; one for 262,144 tokens has 33 MB."""
TEXT_BYTES = 256 * MIB
"""Of a text to measure perplexity on."""
REFERENCE_BYTES = 4096
"""Of a file that names a commit in the Hugging Face cache."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def check_file(path: str | os.PathLike[str], limit: int | None = None) -> None:
    """Raises OSError where `path` is not a regular file of at most `limit` bytes; opens nothing."""
    try:
        status = os.stat(path)
    except ValueError as error:  # a NUL byte, or a lone surrogate
        raise OSError(errno.EINVAL, f"no file can have this name ({error})") from error
    _check(status, limit)


def open_file(path: str | os.PathLike[str], flags: int = 0) -> int:
    """Opens a regular file for reading, and returns its descriptor.

    Checks its kind first, because opening a pipe waits for its writer, and opening a device may do anything. Checks it
    again once it is open, because another file may have taken its place.
    """
    check_file(path)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        _check(os.fstat(fd), None)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_file(path: str | os.PathLike[str], limit: int) -> bytes:
    """Returns all bytes of a regular file, at most `limit`."""
    check_file(path, limit)
    with os.fdopen(open_file(path), "rb") as file:
        content = file.read(limit + 1)  # its size may be unknown to the system, or have grown
    if len(content) > limit:
        raise _too_long(len(content), limit)
    return content


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """Returns the text of a UTF-8 file of at most `limit` bytes, with newlines as line ends."""
    return io.StringIO(read_file(path, limit).decode(), newline=None).read()


def _check(status: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in _KINDS if test(status.st_mode)), "something else")
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {kind}, and must be a regular file")
    if limit is not None and status.st_size > limit:
        raise _too_long(status.st_size, limit)


def _too_long(size: int, limit: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size} bytes or more, and at most {limit} are read")
