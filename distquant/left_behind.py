"""Leaves nothing behind when a launcher is killed: a guardian ends its processes and removes its temporary folders.

The guardian is a small process of its own. It reads names of folders and numbers of processes from a pipe whose other
end only the launcher has. When that closes, the launcher has ended, however it did. A signal that the kernel sends to
ranks at their parent's death would not remove folders, and ranks that are stopped could not do it themselves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from distquant.errors import InputError

GUARDIAN = """
import os, shutil, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
processes, folders = [], []
for line in sys.stdin.buffer:
    kind, _, name = line.rstrip().partition(b" ")
    try:
        if kind == b"process":
            # A handle, because the number may be another process's by then.
            processes.append(os.pidfd_open(int(name)))
        else:
            folders.append(os.fsdecode(bytes.fromhex(name.decode())))
    except (ProcessLookupError, AttributeError):
        pass  # it has ended since, or this is not Linux
for process in processes:
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
for folder in folders:
    shutil.rmtree(folder, ignore_errors=True)
"""

_guardian: subprocess.Popen[bytes] | None = None
"""Started with the first thing to guard; it ends with this process."""


def _forget() -> None:
    global _guardian
    _guardian = None


os.register_at_fork(after_in_child=_forget)  # a fork is a launcher of its own


def _register(line: str) -> None:
    global _guardian
    if _guardian is None:
        # A session of its own: neither Ctrl-C nor a signal to this process's group reaches it.
        _guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARDIAN], stdin=subprocess.PIPE, start_new_session=True
        )
    assert _guardian.stdin is not None
    with suppress(BrokenPipeError):  # somebody has ended it; there is no other
        _guardian.stdin.write(line.encode() + b"\n")
        _guardian.stdin.flush()


def guard_process(number: int) -> None:
    """Lets a process that this one has started be killed as soon as this one has ended."""
    _register(f"process {number}")


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Makes a temporary folder, and removes it afterwards, also if this process is killed meanwhile.

    Raises:
        InputError: none can be made.
    """
    with made_folder() as folder:
        _register(f"folder {os.fsencode(folder).hex()}")
        yield folder


def made_folder(kind: str = "") -> tempfile.TemporaryDirectory[str]:
    """Returns a temporary folder that goes when it is closed, or when this process ends unless it is killed.

    Raises:
        InputError: none can be made.
    """
    try:
        return tempfile.TemporaryDirectory(prefix=f"distquant-{kind}")
    except OSError as error:
        fault = f"no folder for temporary files can be made ({error.strerror or error})"
        fix = "Set TMPDIR to a folder on a local disk that can be written to and has room"
        raise InputError.one("TMPDIR", fault, fix) from error
