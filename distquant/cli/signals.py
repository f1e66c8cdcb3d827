"""Ctrl-C and SIGTERM end a command with one line and their own exit code, after all that it has started."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}

GIVE_UP = 20.0
"""Seconds after which a command that does not end is ended at once; what it has started is ended by its guardian."""


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the process by an exception, so that what it has started is ended first."""
    last = threading.Timer(GIVE_UP, os._exit, [128 + number])  # for where a library takes the exception for its own
    last.daemon = True
    last.start()
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def as_exits() -> Iterator[None]:
    """Turns signals that would end this process at once into exceptions; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def code_of(error: BaseException) -> int | None:
    """Prints the line of a signal whose exception has ended the command; returns its exit code, or None for others."""
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(error, SystemExit) and error.code in [128 + number for number in NAMES]:
        number = signal.Signals(int(error.code) - 128)
    else:
        return None
    # A KeyboardInterrupt that passed a call of `exec`, as imports have them, is noted by Python, which then ends the
    # process by SIGINT in place of its exit code, although the exception was caught. The next call clears the note.
    exec("")
    print(f"distquant: ended by {NAMES[number]}", file=sys.stderr, flush=True)
    return 128 + number
