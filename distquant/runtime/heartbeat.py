"""Signs of life of ranks: each writes what it is doing into a store every second, and sees whose beat stands still.

A rank that waits knows only whom it waits for, and that one may wait in turn. Every rank's own beat names the one that
is stopped. Beats come from a thread of their own, so a rank that works for long, or waits for others, still has them.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from distquant import activity
from distquant.errors import SilentRankError
from distquant.parallel.comm import MISSED
from distquant.runtime.meeting import Meeting, by_launcher

EVERY = 1.0
"""Seconds between two beats."""

RANKS = 32
"""Ranks up to which beats come this often; each sees those of all, so more of them beat less often."""


class Quiet:
    """Seconds since something last changed, as far as this process was awake to see it.

    A process that was stopped itself, as all are when a whole job is, must not blame others for that time.
    """

    def __init__(self) -> None:
        self.value: object = None
        self.seconds = 0.0

    def look(self, value: object, step: float, most: float = 2 * EVERY) -> None:
        """Takes the value that is there now, `step` seconds after the last look, of which `most` count."""
        self.seconds = 0.0 if value != self.value else self.seconds + min(step, most)
        self.value = value


class Heartbeats:
    """This rank's beats, and those of the others as this rank sees them. Use as a context manager.

    Args:
        store: of all ranks; a connection of its own, because a wait on a shared one holds up all its users.
        rank: this rank.
        world: the number of ranks.
        timeout: seconds of silence that are given.
        served_by: the rank whose process holds the store; None: a launcher's.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float, served_by: int | None = None):
        self._store, self._rank, self._timeout, self._served_by = store, rank, timeout, served_by
        self._quiet = {other: Quiet() for other in range(world) if other != rank}
        self._seen: dict[int, tuple[str, str, int]] = {}
        """What each rank was doing at its last beat, its machine, and its process."""
        self._every = EVERY * max(1.0, world / RANKS)
        self._asked = Quiet()
        """The store itself: it does not answer if the process that holds it is stopped."""
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._look_at_store)]
        self._beats = 0

    def __enter__(self) -> Heartbeats:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._threads[0].join(EVERY)  # so that others learn that this rank has left

    def silent(self, seconds: float | None = None) -> SilentRankError | None:
        """Returns the error of the rank that is silent for longest, if for so many seconds (None: the timeout)."""
        least = self._timeout if seconds is None else min(seconds, self._timeout)
        # What this rank sees of others is as old as the last answer of the store.
        blind = self._asked.seconds
        if blind >= least and blind >= MISSED and self._served_by != self._rank:
            if self._served_by is None:
                return None
            return self._error(self._served_by, blind)
        rank = max(self._quiet, key=lambda other: self._quiet[other].seconds, default=None)
        if rank is None or self._quiet[rank].seconds < least:
            return None
        return self._error(rank, self._quiet[rank].seconds)

    def wake(self, rank: int) -> None:
        """Lets a stopped rank of this machine go on, so that its launcher's SIGTERM can end it."""
        _, machine, process = self._seen.get(rank, ("", "", 0))
        if machine == socket.gethostname():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGCONT)

    def _error(self, rank: int, seconds: float) -> SilentRankError:
        if rank not in self._seen:
            return SilentRankError.of(rank, seconds, "starting")
        doing, _, process = self._seen[rank]
        return SilentRankError.of(rank, seconds, doing, process)

    def _beat(self) -> None:
        """Writes this rank's beat and reads the others', until the end; a store that is gone ends it, too."""
        before = time.monotonic()
        with suppress(RuntimeError):  # ranks notice by themselves that others have ended
            while not self._ended.is_set():
                own = [self._beats, activity.current(), socket.gethostname(), os.getpid()]
                self._store.set(str(self._rank), json.dumps(own))
                self._beats += 1
                now = time.monotonic()
                self._look(now - before)
                before = now
                self._ended.wait(self._every)
            self._store.set(str(self._rank), "")

    def _look(self, step: float) -> None:
        for other, quiet in self._quiet.items():
            # A rank that has not come yet is silent, too.
            text = self._store.get(str(other)) if self._store.check([str(other)]) else None
            quiet.look(text, step, 2 * self._every)
            if text:
                self._seen[other] = tuple(json.loads(text)[1:])
            elif text is not None:  # it has left, and is not waited for any more
                quiet.seconds = 0.0

    def _look_at_store(self) -> None:
        """Counts how long the store has not answered the thread that beats."""
        before = time.monotonic()
        while not self._ended.wait(EVERY):
            now = time.monotonic()
            self._asked.look(self._beats, now - before)
            before = now


_current: Heartbeats | None = None
_kept: ExitStack | None = None
"""Where beats go on when the load that began them is done."""


def current() -> Heartbeats | None:
    """Returns the beats of this process, if there are any now."""
    return _current


@contextmanager
def beating(meeting: Meeting | None, timeout: float) -> Iterator[None]:
    """Beats meanwhile for this rank; inside another call, that one's beats go on.

    Args:
        meeting: where ranks meet; None: at the store of the default process group.
        timeout: seconds of silence that are given.
    """
    if _current is not None:
        yield
    elif _kept is not None:
        _kept.enter_context(_begun(meeting, timeout))
        yield
    else:
        with _begun(meeting, timeout):
            yield


@contextmanager
def kept() -> Iterator[None]:
    """Lets beats that begin meanwhile go on until the end."""
    global _kept
    with ExitStack() as stack:
        _kept = stack
        try:
            yield
        finally:
            _kept = None


@contextmanager
def _begun(meeting: Meeting | None, timeout: float) -> Iterator[None]:
    global _current
    shared, rank, world = meeting or (_get_default_store(), dist.get_rank(), dist.get_world_size())
    store = shared.clone()  # type: ignore[attr-defined]
    store.set_timeout(datetime.timedelta(seconds=timeout))
    while isinstance(shared, dist.PrefixStore):
        shared = shared.underlying_store
    served_by = 0 if isinstance(shared, dist.TCPStore) and not by_launcher() else None
    store = dist.PrefixStore("distquant/heartbeat", store)
    with Heartbeats(store, rank, world, timeout, served_by) as beats:
        _current = beats
        try:
            yield
        finally:
            _current = None
