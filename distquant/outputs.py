"""Writes files that a user has named, whole or not at all; checks before the work that they can be written.

A file is written beside its place and renamed, so whoever reads it never sees a part, and a disk that fills up leaves
what was there before. Devices and pipes, such as `/dev/stdout`, have no such place and are written to as they are.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress

from distquant.errors import InputError, Problem

ROOM = 1 << 16
"""Bytes that are tried before the work: a full disk may still take a file's name. A report has 2 kB for each rank."""

_UNWRITABLE = (errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def output_problem(where: str, path: str | os.PathLike[str]) -> Problem | None:
    """Returns why a file could not be written when the work is done, as far as that can be known before.

    Args:
        where: the option that names it.
        path: of the file; one that is there is left as it is.
    """
    try:
        target, present = _target(path)
        if present is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if present is None or stat.S_ISREG(present.st_mode):
            os.unlink(_written_beside(target, present, bytes(ROOM)))
    except (OSError, ValueError) as error:
        return _problem(where, path, error)
    return None


def write_output(where: str, path: str | os.PathLike[str], text: str) -> None:
    """Writes a text in UTF-8; raises InputError, and leaves what was there, where that cannot be done.

    Args:
        where: the option that names the file.
        path: of the file.
        text: to write. Halves of characters, which a path may have, are spelled out.
    """
    content = text.encode("utf-8", "backslashreplace")
    try:
        target, present = _target(path)
        if present is None or stat.S_ISREG(present.st_mode):
            _rename(_written_beside(target, present, content), target)
        else:
            _write_into(target, content)
    except (OSError, ValueError) as error:
        problem = _problem(where, path, error)
        raise InputError([problem]) from error


def _target(path: str | os.PathLike[str]) -> tuple[str, os.stat_result | None]:
    """Returns the path with links followed, and what is there now; raises OSError where that cannot be a file."""
    if not os.fspath(path):
        raise OSError(errno.ENOENT, "no file is named")
    target = os.path.realpath(path)
    try:
        present = os.stat(target)
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(present.st_mode) or stat.S_ISSOCK(present.st_mode):
        kind = "folder" if stat.S_ISDIR(present.st_mode) else "socket"
        raise OSError(errno.EISDIR, f"is a {kind}")
    return target, present


def _written_beside(target: str, present: os.stat_result | None, content: bytes) -> str:
    """Returns the path of a new file in the target's folder, with this content and the permissions of its place."""
    beside = os.path.join(os.path.dirname(target), f".distquant-{secrets.token_hex(8)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            if present is not None:
                with suppress(OSError):  # some file systems have no permissions
                    os.fchmod(fd, stat.S_IMODE(present.st_mode))
            file.write(content)
    except BaseException:
        os.unlink(beside)
        raise
    return beside


def _rename(beside: str, target: str) -> None:
    try:
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _write_into(target: str, content: bytes) -> None:
    """Writes into a device or pipe; a pipe that nobody reads is an error, and is not waited for."""
    fd = os.open(target, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(fd, True)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def _problem(where: str, path: str | os.PathLike[str], error: OSError | ValueError) -> Problem:
    name, number = os.fspath(path), getattr(error, "errno", None)
    if number == errno.ENOENT and name:
        folder = os.path.dirname(os.path.realpath(name))
        return Problem(where, f"the folder {folder} does not exist", "Create it, or give another path")
    if number == errno.EISDIR:
        return Problem(where, f"{name} {error.strerror}", "Give the name of a file")  # type: ignore[union-attr]
    reason = "nobody reads this pipe" if number == errno.ENXIO else getattr(error, "strerror", None) or error
    fix = "Give the name of a file that can be written"
    if number in _FULL:
        fix = "Make room there, or give another path"
    elif number in _UNWRITABLE:
        fix = "Check its permissions and those of its folder, or give another path"
    return Problem(where, f"{name or repr(name)} cannot be written ({reason})", fix)
