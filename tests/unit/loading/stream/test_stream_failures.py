"""A failure on one rank ends all of them, with its name; and nothing is left behind, whatever the end."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
import time
from collections import Counter

import pytest
from test_stream_engine import assert_right, delays, quick, random_world
from world import World, nothing_left_behind, sometimes

from distquant.errors import RankError
from distquant.loading.stream.files import ReadError
from distquant.sharding.mesh import Mesh

__all__ = ["quick"]  # a fixture
THREE = {"mesh": Mesh(tp=3), "nodes": (0, 0, 0), "count": 6, "short": False}


@pytest.fixture(autouse=True)
def nothing_left():
    """Threads, open files and staging memory are the same after a test as before."""
    with nothing_left_behind():
        yield


class Fault:
    """Raises when a rank comes to a place for the nth time."""

    def __init__(self, rank: int, place: str, nth: int, error: BaseException, seed: int = 0):
        self.rank, self.place, self.left, self.error = rank, place, nth, error
        self.chance, self.guard, self.fired = random.Random(seed), threading.Lock(), False

    def __call__(self, rank: int, place: str, tensor: str) -> None:
        sometimes(self.chance, 0.004)
        if (rank, place) == (self.rank, self.place):
            with self.guard:
                self.left -= 1
                now = self.left == 0
            if now:
                self.fired = True
                raise self.error


def fault_somewhere(seed: int, folder, error: BaseException, places: tuple[str, ...]) -> tuple[World, Fault]:
    """A world in which a rank fails at a place that it does come to, somewhere along the way."""
    chance, visits = random.Random(seed), Counter()
    dry = random_world(seed, folder, **THREE, hook=lambda rank, place, tensor: visits.update([(rank, place)]))
    dry.run()
    assert_right(dry)
    rank, place = chance.choice(sorted(visit for visit in visits if visit[1] in places))
    count = visits[rank, place]
    nth = chance.randint(1, count if place in ("finish", "progress") else max(count // 2, 1))
    fault = Fault(rank, place, nth, error, seed)
    dry.hook = fault
    return dry, fault


def assert_failure_named(world: World, fault: Fault, own: type[BaseException]) -> None:
    assert fault.fired
    for rank, outcome in enumerate(world.outcomes):
        if rank == fault.rank:
            assert type(outcome.error) is own
        else:
            assert isinstance(outcome.error, RankError), f"rank {rank} ended with {outcome.error!r}"
            assert outcome.error.rank == fault.rank, f"rank {rank}: {outcome.error}, it was rank {fault.rank}"
            assert not re.search(r"\d s( after|$)", str(outcome.error)), (
                "it received the error, and need not wait for the timeout"
            )


@pytest.mark.parametrize("seed", range(12))
def test_failing_rank_is_named_on_all(tmp_path, seed):
    world, fault = fault_somewhere(seed, tmp_path, ValueError("boom"), ("encode", "read", "finish", "progress"))
    world.run()
    assert_failure_named(world, fault, ValueError)


@pytest.mark.parametrize("seed", range(4))
def test_failure_while_threads_read_already_is_named_on_all(tmp_path, seed):
    world, fault = fault_somewhere(seed, tmp_path, ValueError("boom"), ("started",))
    world.run()
    assert_failure_named(world, fault, ValueError)


@pytest.mark.parametrize("seed", range(4))
def test_read_that_fails_for_good_is_named_on_all(tmp_path, seed):
    error = OSError(errno.EACCES, os.strerror(errno.EACCES))
    world, fault = fault_somewhere(seed, tmp_path, error, ("read",))
    world.run()
    assert_failure_named(world, fault, ReadError)
    assert all("Permission denied" in str(outcome.error) for outcome in world.outcomes)


@pytest.mark.parametrize("seed", range(4))
def test_interruption_ends_all(tmp_path, seed):
    world, fault = fault_somewhere(seed, tmp_path, KeyboardInterrupt(), ("progress", "encode"))
    world.run()
    assert_failure_named(world, fault, KeyboardInterrupt)


def test_failure_when_others_are_done_keeps_its_text(tmp_path):
    """A rank fails in its last tensor, when the others have sent that they are done, and wait."""
    world = random_world(1, tmp_path, **THREE)
    last = world.tensors[-1].name

    def hook(rank: int, place: str, tensor: str) -> None:
        if (rank, place, tensor) == (1, "finish", last):
            time.sleep(0.3)
            raise ValueError("boom")

    world.hook = hook
    world.run()
    assert type(world.outcomes[1].error) is ValueError
    for rank in (0, 2):
        error = world.outcomes[rank].error
        assert isinstance(error, RankError)
        assert error.rank == 1
        assert "boom" in str(error)


@pytest.mark.parametrize("seed", range(3))
def test_rank_that_sends_nothing_is_named(tmp_path, seed):
    """It hangs (in a kernel, say), and its files, sockets and threads are all well."""
    world = random_world(seed, tmp_path, **THREE, timeout=1.0)
    silent = seed % 3

    def hook(rank: int, place: str, tensor: str) -> None:
        if rank == silent and place == "finish":
            give_up = time.monotonic() + 120
            others = [outcome for r, outcome in enumerate(world.outcomes) if r != silent]
            while any(outcome.error is None for outcome in others) and time.monotonic() < give_up:
                time.sleep(0.01)

    world.hook = hook
    world.run()
    for rank, outcome in enumerate(world.outcomes):
        assert isinstance(outcome.error, RankError)
        if rank != silent:
            assert outcome.error.rank == silent
            assert "1 s" in str(outcome.error)


@pytest.mark.parametrize("seed", range(3))
def test_success_leaves_nothing(tmp_path, seed):
    world = random_world(seed, tmp_path, **THREE, hook=delays(seed, 0.002))
    world.run()
    assert_right(world)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


def alone(folder, hook) -> World:
    return random_world(3, folder, mesh=Mesh(), nodes=(0,), count=5, staging=1, hook=hook)


def run_here(world: World) -> None:
    """Runs the only rank on this thread, the one that signals come to."""
    world.prepare()
    world.load(0, world.outcomes[0])


@pytest.fixture
def ctrl_c():
    """Python's own answer to SIGINT, which processes that run tests side by side ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["started", "encode", "finish", "progress"])
def test_ctrl_c_while_working(tmp_path, place):
    world = alone(tmp_path, lambda rank, at, tensor: signal.raise_signal(signal.SIGINT) if at == place else None)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_here(world)
    caught.value.with_traceback(None)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_waiting_for_a_read(tmp_path):
    """The read is waited for, as its memory must not vanish under it; nothing else is done any more."""
    back, finished = threading.Event(), []

    def hook(rank: int, place: str, tensor: str) -> None:
        if place == "read":
            assert back.wait(20)
        elif place == "finish":
            finished.append(tensor)

    def interrupt() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        back.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    world = alone(tmp_path, hook)
    with pytest.raises(KeyboardInterrupt) as caught:
        run_here(world)
    caught.value.with_traceback(None)
    del caught
    thread.join()
    assert not finished
