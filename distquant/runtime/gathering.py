"""The results of a call on Ray workers, and the failure of one as the error of its rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import ray

from distquant.errors import DistquantError, LostPeerError, RankError
from distquant.parallel.comm import MISSED
from distquant.runtime.ray_watch import Watch

POLL = 0.2
"""Seconds between looks at the workers."""

GRACE = 5.0
"""Seconds to wait for the error of the rank that others have lost."""


class Gathering:
    """The results of a call, one from each rank, as they come.

    The error of a rank that lost its peer may arrive before the peer's own, which is then awaited for a moment.
    """

    def __init__(self, futures: list[Any], watch: Watch | None = None):
        self._watch = watch
        self._pending = {future: rank for rank, future in enumerate(futures)}
        self._found: dict[int, Any] = {}
        self._lost: dict[int, DistquantError] = {}
        self._deadline = math.inf

    @property
    def done(self) -> bool:
        """True once there is nothing to wait for."""
        return not self._pending or time.monotonic() >= self._deadline

    def look(self, timeout: float) -> None:
        """Takes what there is, or comes within `timeout` seconds; raises a failure, as that of the rank it is of.

        A rank that is silent is the cause of the others' failures.
        """
        if self._watch is not None:
            self._watch.look()
        ready, _ = ray.wait(list(self._pending), timeout=timeout)
        for future in ready:
            rank = self._pending.pop(future)
            try:
                self._found[rank] = ray.get(future)
            except ray.exceptions.RayError as error:
                failure = failure_of(rank, error)
                if isinstance(failure, RankError) and self._watch is not None:
                    failure = self._watch.silent(MISSED) or failure
                if not isinstance(failure, LostPeerError):
                    raise failure from None
                self._lost[rank] = failure
                self._deadline = min(self._deadline, time.monotonic() + GRACE)

    def take(self, future: Any) -> Any:
        """Returns the result of another call to one of the workers; raises a failure as `look` does."""
        while not ray.wait([future], timeout=POLL)[0]:
            self.look(0)
        return ray.get(future)

    def results(self) -> list[Any]:
        """Returns all results in rank order, once done; raises the failure of a rank whose peer told nothing."""
        if self._lost:
            raise self._lost[min(self._lost)]
        return [self._found[rank] for rank in range(len(self._found))]


def gather(futures: list[Any], tick: Callable[[], None] | None = None, watch: Watch | None = None) -> list[Any]:
    """Returns results in rank order; raises a failure at once, as the error of the rank that caused it."""
    gathering = Gathering(futures, watch)
    while not gathering.done:
        gathering.look(POLL)
        if tick is not None:
            tick()
    return gathering.results()


def failure_of(rank: int, error: ray.exceptions.RayError) -> DistquantError:
    """Returns the error to raise for a worker's: its own if that is one of ours."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return RankError(rank, str(error).strip().splitlines()[0])
    cause = error.cause
    return cause if isinstance(cause, DistquantError) else RankError(rank, f"{type(cause).__name__}: {cause}")


def lost_peer(rank: int, future: Any) -> bool:
    """Returns True if a rank died, or a collective of it failed: its process group is of no use then."""
    try:
        ray.get(future)
    except ray.exceptions.RayTaskError as error:
        return isinstance(failure_of(rank, error), LostPeerError)
    except ray.exceptions.RayError:
        return True
    return False
