"""One display of a process: a thread draws what is being done, and how far ranks have come."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from distquant import activity
from distquant.errors import InputError
from distquant.left_behind import temporary_folder
from distquant.options import LoadProgress
from distquant.progress.snapshot import Snapshot, View
from distquant.threads import start_thread

if TYPE_CHECKING:
    from typing import TextIO

Source = Callable[[], Sequence[LoadProgress]]
"""Returns the progress of every rank; raises `RuntimeError` when it cannot any more."""


class Viewer(Protocol):
    """Shows the progress of every rank: that which it is called with, or that of a source that it asks."""

    def __call__(self, ranks: Sequence[LoadProgress]) -> None: ...

    def follow(self, source: Source) -> None: ...


EVERY, ASK_EVERY = 0.1, 0.5
"""Seconds after which the thread draws again, and asks its source again."""

PATIENCE = 5.0
"""Seconds that closing waits for the thread, which a source may hold up."""


class Target(Protocol):
    """A place to draw on. It decides how often it does."""

    def draw(self, view: View, at_once: bool = False) -> None: ...

    def end_load(self, view: View) -> None: ...

    def close(self) -> None: ...


class Display:
    """Draws on a target from a thread of its own, until it is closed."""

    def __init__(self, target: Target, status: str, clock: Callable[[], float] = time.monotonic):
        self._target, self._clock = target, clock
        self._lock, self._drawing, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._status, self._opened = status, clock()
        self._changed, self._first_bytes = self._opened, 0.0
        self._ranks: tuple[LoadProgress, ...] = ()
        self._source: Source | None = None
        self._taken: Callable[[], bool] | None = None
        self._asked = 0.0
        self._thread = threading.Thread(target=self._run, name="distquant-progress", daemon=True)

    def start(self, at_once: bool = False) -> None:
        """Starts the thread; draws `at_once` if what comes now may hold up all threads for a while."""
        if at_once:
            self._target.draw(self.view(), at_once=True)
        start_thread(self._thread)

    def close(self) -> None:
        """Ends the thread, and lets the target end its drawing."""
        self._ended.set()
        self._thread.join(PATIENCE)
        with self._drawing:
            self._target.close()

    def set_status(self, status: str) -> None:
        with self._lock:
            if status != self._status:
                self._status, self._changed = status, self._clock()

    def __call__(self, ranks: Sequence[LoadProgress]) -> None:
        """Takes the progress of the ranks that is known."""
        if not ranks:
            return
        with self._lock:
            # Rates count from the first bytes: ranks start at different times, and plan before they read.
            if any(rank.total for rank in ranks) and not any(rank.total for rank in self._ranks):
                self._first_bytes = self._clock()
            self._ranks = tuple(ranks)

    def follow(self, source: Source) -> None:
        """Asks a source for the progress from now on."""
        self._source = source

    def end_load(self, done: bool) -> None:
        """Ends the rows of a load that has ended; shows once more how far the ranks came if it is `done`."""
        if done and self._source is not None:
            self._ask(self._source)
        if done:
            with self._drawing:
                self._target.end_load(self.view())
        with self._lock:
            self._ranks, self._source = (), None

    def view(self) -> View:
        with self._lock:
            now = self._clock()
            snapshot = Snapshot(self._ranks, now - self._first_bytes) if any(r.total for r in self._ranks) else None
            return View(self._status, now - self._changed, now - self._opened, snapshot)

    def hand_over(self, taken: Callable[[], bool] | None) -> None:
        """Draws nothing once `taken` returns True, until it is set to None again."""
        with self._drawing:
            self._taken = taken
            if taken is not None and taken():
                self._target.close()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            if self._source is not None and self._clock() - self._asked >= ASK_EVERY:
                self._asked = self._clock()
                self._ask(self._source)
            self._draw()

    def _draw(self) -> None:
        with self._drawing:
            if self._taken is not None and self._taken():
                self._target.close()
            else:
                self._target.draw(self.view())

    def _ask(self, source: Source) -> None:
        try:
            ranks = source()
        except RuntimeError:  # the load is about to fail, and says why
            self._source = None
            return
        if self._source is source:
            self(ranks)


def alone(viewer: Viewer) -> Callable[[LoadProgress], None]:
    """Returns a function that shows the progress of the only rank."""
    return lambda seen: viewer([seen])


def first_rank() -> bool:
    """Returns True unless this process is another rank than 0: only that one shows anything."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return bool(dist.get_rank() == 0)
    return os.environ.get("RANK", "0") == "0"


_OPENING = threading.Lock()
_open: list[Display] = []
"""The display of this process, if one is open."""


def status(text: str) -> None:
    """Shows what is being done now, if a display is open; other ranks name it if this one falls silent."""
    activity.enter(text)
    if _open:
        _open[0].set_status(text)


TAKEN = "DISTQUANT_PROGRESS_TAKEN"
"""Environment variable: the file that the first rank makes when it shows its own progress."""


@contextmanager
def handed_over() -> Iterator[None]:
    """Leaves the terminal, meanwhile, to a process that is started now, as soon as that shows its own progress."""
    if not _open:
        yield
        return
    display = _open[0]
    with temporary_folder() as folder:
        os.environ[TAKEN] = path = os.path.join(folder, "taken")

        def taken() -> bool:
            exists = os.path.exists(path)
            if exists:  # for the time after
                display.set_status("waiting for the ranks to end")
            return exists

        display.hand_over(taken)
        try:
            yield
        finally:
            display.hand_over(None)
            del os.environ[TAKEN]


def give_back() -> None:
    """Leaves the terminal to the process that has started this one, if it showed progress before."""
    if TAKEN in os.environ and first_rank():
        if _open:
            _open[0].hand_over(lambda: True)
        with suppress(FileNotFoundError):
            os.unlink(os.environ[TAKEN])


@contextmanager
def working(text: str, *, only_where_seen: bool = False, at_once: bool = False) -> Iterator[None]:
    """Shows meanwhile what is being done: on standard error, unless a display is open already.

    Args:
        text: the status to begin with.
        only_where_seen: show nothing unless standard error is a terminal, or this is a notebook.
        at_once: begin to show it before the work begins. Loading a large library holds up all threads for seconds.
    """
    target = None if _open else target_of(sys.stderr, only_where_seen)
    display = None
    if target is not None and _OPENING.acquire(blocking=False):  # another thread's display may be open by now
        display = Display(target, text)
        if TAKEN in os.environ and first_rank():
            open(os.environ[TAKEN], "w").close()
        _open.append(display)
        display.start(at_once)
    else:
        status(text)
    try:
        yield
    finally:
        if display is not None:
            _open.remove(display)
            display.close()
            _OPENING.release()


@contextmanager
def showing(progress: Any, here: bool = True) -> Iterator[Viewer | None]:
    """Shows a load, as the argument `progress` of the Python API says; yields what takes the progress of its ranks.

    Args:
        progress: True to show it; False to show nothing; None to show it on a terminal, in a notebook, and in a display
            that is open already. A callable is called by others, and nothing is shown.
        here: False on a rank that leaves showing to another.

    Raises:
        InputError: another value.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        fix = "Give True, False or a function; without it, progress is shown on a terminal"
        raise InputError.one("progress", f"invalid value {progress!r}", fix)
    if not here or callable(progress) or progress is False:
        yield None
        return
    fresh = "torch" not in sys.modules
    with working("importing torch and transformers", only_where_seen=progress is None, at_once=fresh):
        if not _open:
            yield None
            return
        display, done = _open[0], False
        try:
            yield display
            done = True
        finally:
            display.end_load(done)


def target_of(stream: TextIO, only_where_seen: bool = False) -> Target | None:
    """Returns the target for a stream: bars, lines, or None where nobody would see them."""
    from distquant.progress.targets import Lines, LiveTerminal, Notebook, in_notebook, is_terminal

    if in_notebook():
        return Notebook()
    if is_terminal(stream):
        return LiveTerminal(stream)
    return None if only_where_seen else Lines(stream)
