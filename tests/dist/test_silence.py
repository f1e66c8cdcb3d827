"""A rank that is stopped in the middle of a load is named by the others, with what it was doing."""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import Any

import pytest
import torch.distributed as dist
from work import error_of, rank

import distquant as dq
from distquant.runtime.collectives import collect
from distquant.runtime.heartbeat import EVERY, Heartbeats, Quiet

TIMEOUT = 4.0


def stopped_while_loading(path: str, victim: int) -> str:
    """Error of a load in which a rank stops itself; the other one lets it go on afterwards."""
    processes, here, stops = collect(os.getpid()), rank(), [signal.SIGSTOP]

    def progress(seen: Any) -> None:
        if here == victim and stops:
            stops.clear()
            os.kill(os.getpid(), signal.SIGSTOP)

    error = error_of(dq.load, path, "nf4", mesh="tp=2", timeout=TIMEOUT, progress=progress)
    if here != victim:
        os.kill(processes[victim], signal.SIGCONT)
    return str(error)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named(ranks: Any, model_of: Any, victim: int) -> None:
    found = ranks.run(2, stopped_while_loading, model_of("llama-gqa"), victim)[1 - victim]
    assert re.match(rf"rank {victim} has been silent for \d+ s, last seen while \w", found), found


def watching(store: dist.Store, count: int = 2) -> list[Heartbeats]:
    return [Heartbeats(store, number, count, 60.0) for number in range(count)]


def test_the_rank_whose_beat_stands_still_is_named() -> None:
    first, second = watching(dist.HashStore())
    with first:
        with second:
            pass
        # What `second` has left behind: it is not waited for.
        first._look(50.0)
        assert first.silent(EVERY) is None
        first._store.set("1", '[7, "reading a.bin", "elsewhere", 5]')
        first._look(EVERY)
        for _ in range(4):
            first._look(EVERY)
        assert str(first.silent(3 * EVERY)).startswith("rank 1 has been silent for 4 s, last seen while reading a.bin.")
        assert first.silent() is None  # the timeout is not over


def test_a_process_that_was_stopped_itself_blames_nobody_for_that_time() -> None:
    quiet = Quiet()
    quiet.look("beat", EVERY)
    quiet.look("beat", 3600.0)
    assert quiet.seconds == 2 * EVERY


def test_a_rank_that_serves_the_store_is_named_when_it_does_not_answer() -> None:
    class Stopped(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            threading.Event().wait(3600)

    beats = Heartbeats(Stopped(), 1, 2, 3.0, served_by=0)
    beats._asked.look(0, EVERY)
    for _ in range(4):
        beats._asked.look(0, EVERY)
    assert str(beats.silent()).startswith("rank 0 has been silent for")
