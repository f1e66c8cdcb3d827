"""Signs of life of Ray workers, as their driver sees them: each answers a question a second, whatever else it does."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from distquant.errors import SilentRankError
from distquant.runtime.heartbeat import EVERY, Quiet

STARTING = 60.0
"""Seconds that a worker may take to answer for the first time, at least: it is scheduled, and imports libraries."""


@dataclass(frozen=True)
class Sign:
    """An answer of a worker: what it is doing, and the Ray node and process that it is."""

    activity: str
    node: str
    process: int


@dataclass
class _Seen:
    worker: Any
    asked: Any = None
    """The question that is not answered yet."""
    answers: int = 0
    sign: Sign | None = None
    quiet: Quiet = field(default_factory=Quiet)


class Watch:
    """The workers of a model. Nothing is asked between two calls of `look`, so an idle model costs nothing.

    Args:
        workers: in rank order; each has a method `alive` that returns a `Sign`.
        timeout: seconds of silence that are given.
    """

    def __init__(self, workers: list[Any], timeout: float):
        self._timeout = timeout
        self._seen = [_Seen(worker) for worker in workers]
        self._looked = time.monotonic()

    def look(self) -> None:
        """Takes answers and asks again.

        Raises:
            SilentRankError: a worker has not answered for the timeout.
        """
        now = time.monotonic()
        if now - self._looked < EVERY:
            return
        step, self._looked = now - self._looked, now
        for each in self._seen:
            if each.asked is not None and ray.wait([each.asked], timeout=0)[0]:
                # One that has died is not silent: its call says so.
                with suppress(ray.exceptions.RayError):
                    each.sign = ray.get(each.asked)
                each.answers += 1
                each.asked = None
            if each.asked is None:
                each.asked = each.worker.alive.remote()
            each.quiet.look(each.answers, step)
        if (silent := self.silent()) is not None:
            raise silent

    def silent(self, seconds: float | None = None) -> SilentRankError | None:
        """Returns the error of the worker that is silent for longest, if for so many seconds (None: the timeout)."""
        rank = max(range(len(self._seen)), key=lambda rank: self._seen[rank].quiet.seconds)
        sign, quiet = self._seen[rank].sign, self._seen[rank].quiet.seconds
        least = self._timeout if seconds is None else min(seconds, self._timeout)
        if quiet < (least if sign is not None else max(least, STARTING)):
            return None
        if sign is None:
            return SilentRankError.of(rank, quiet, "starting")
        return SilentRankError.of(rank, quiet, sign.activity, sign.process)

    def end_silent(self) -> None:
        """Kills workers of this machine that do not answer: one that is stopped cannot end when Ray asks it to."""
        here = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        for each in self._seen:
            if each.sign is not None and each.sign.node == here and each.quiet.seconds >= 2 * EVERY:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(each.sign.process, signal.SIGKILL)
