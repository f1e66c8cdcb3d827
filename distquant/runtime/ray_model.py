"""A model on Ray workers: one call at a time goes to all of them, and the failure of one rank ends it."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from distquant.errors import DistquantError, InputError, LostPeerError, RankError
from distquant.planning import LoadPlan
from distquant.runtime.answer import Answer, Messages
from distquant.runtime.query import Outcome, Query

POLL = 0.2
"""Seconds between looks at the workers."""

GRACE = 5.0
"""Seconds to wait for the error of the rank that others have lost."""


class Sharded:
    """A model that lives on Ray workers. Use as a context manager, or `close` it.

    Any number of threads may use it: calls wait for each other, because every call needs all workers. One process
    holds it; others send their requests to that process (for example a Ray actor).
    """

    def __init__(self, plan: LoadPlan, workers: list[Any], group: PlacementGroup | None, started_ray: bool):
        self.plan, self._workers, self._group, self._started_ray = plan, workers, group, started_ray
        self._one_call = threading.Lock()
        self._streams = 0
        """Streams so far: the number of the last one."""
        self._unfinished: list[Any] = []
        """Results of a call that failed; other ranks may still be waiting in it."""
        self._failure: DistquantError | None = None

    def __reduce__(self) -> Any:
        fault = "it cannot be sent to another process, because its calls must reach all workers in one order"
        raise InputError.one("ray", fault, "Let a Ray actor load it, and send the requests to that actor")

    def __enter__(self) -> Sharded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def perform(self, query: Query) -> Outcome:
        """Runs a query on all workers."""
        return self._everywhere("perform", query)[0]

    def generate(self, prompt: str | Sequence[str] | Messages, **kwargs: Any) -> Any:
        """Prompt and continuation; keyword arguments go to `generate` of transformers.

        Several prompts are answered as a batch: then, and with `num_return_sequences`, the result is a list. Messages
        (dicts with `role` and `content`) are a conversation: the result is the answer alone.

        Raises:
            InputError: the model cannot take the messages, or its context has no room for an answer.
            RankError: ranks did not agree on the tokens.
        """
        from distquant.runtime.answer import generate

        answers = self.call(generate, prompt, **kwargs)
        _check_equal(answers)
        return answers[0]

    def stream(self, prompt: str | Messages, **kwargs: Any) -> Iterator[str]:
        """Yields the answer to messages, or the continuation of a prompt, in pieces as they come.

        Keyword arguments go to `generate` of transformers. Leave the loop, or `close` the iterator, to end the answer
        early. Other calls wait until the answer is complete, not until its pieces are taken.

        Raises:
            InputError: the model cannot take the messages, or its context has no room for an answer.
            RankError: ranks did not agree on the tokens.
        """
        return self.pieces(prompt, **kwargs)

    def pieces(self, prompt: str | Messages, **kwargs: Any) -> Generator[str, None, Answer]:
        """Yields what `stream` does, and returns the whole `Answer`."""
        found: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        left = threading.Event()
        # A thread takes the pieces from the workers: a caller who asks something else meanwhile can wait for them.
        thread = threading.Thread(target=self._take, args=(prompt, kwargs, found.put, left), daemon=True)
        thread.start()
        try:
            while isinstance(piece := found.get(), str):
                yield piece
            if isinstance(piece, BaseException):
                raise piece
            return piece
        finally:
            left.set()
            thread.join()

    def _take(self, prompt: str | Messages, kwargs: dict[str, Any], put: Callable[[Any], None], left: Any) -> None:
        """Calls `put` with each piece, and then with the answer or an error."""
        try:
            with self._one_call:
                self._check_usable()
                put(self._answer(prompt, kwargs, put, left))
        except BaseException as error:  # the caller, in another thread, must not wait for ever
            put(error)

    def _answer(self, prompt: str | Messages, kwargs: dict[str, Any], put: Callable[[str], None], left: Any) -> Answer:
        self._streams += 1
        number, stopped = self._streams, False
        futures = [worker.answer.remote(number, prompt, kwargs) for worker in self._workers]
        answers = Gathering(futures)
        try:
            while not answers.done:
                for piece in ray.get(self._workers[0].pieces.remote(number, POLL)):
                    put(piece)
                if left.is_set() and not stopped:
                    ray.get([worker.stop.remote(number) for worker in self._workers])
                    stopped = True
                answers.look(0)
            for piece in ray.get(self._workers[0].pieces.remote(number, 0)):
                put(piece)
            found = answers.results()
        except (ray.exceptions.RayError, DistquantError) as error:
            failure = error if isinstance(error, DistquantError) else _failure(0, error)
            self._unfinished, self._failure = futures, failure
            raise failure from None
        if not stopped:  # replicas end where each is
            _check_equal([answer.text for answer in found])
        return found[0]

    def perplexity(self, text: str, window: int = 256) -> float:
        """Perplexity of `text`, see `distquant.perplexity`."""
        value = self.perform(Query(text=text, window=window, fingerprint=False)).perplexity
        assert value is not None
        return value

    def fingerprint(self, *, quantized_only: bool = False) -> str:
        """The fingerprint of the whole model, see `distquant.fingerprint`."""
        if quantized_only:
            from distquant.verification.fingerprint import fingerprint

            return self.call(fingerprint, quantized_only=True)[0]
        return self.report()["fingerprint"]

    def report(self) -> dict[str, Any]:
        """The JSON report of the load, fingerprint included."""
        return self.perform(Query()).report

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(model, *args, **kwargs)` on every worker (a training step, say); results in rank order."""
        return self._everywhere("call", function, *args, **kwargs)

    def _everywhere(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        with self._one_call:
            self._check_usable()
            futures = [getattr(worker, method).remote(*args, **kwargs) for worker in self._workers]
            try:
                return gather(futures)
            except DistquantError as error:
                self._unfinished, self._failure = futures, error
                raise

    def _check_usable(self) -> None:
        """Raises if a call could not end: after `close`, or while ranks wait for one that has failed."""
        if not self._workers:
            raise InputError.one("ray", "the model was closed", "Load it again")
        if self._failure is None:
            return
        _, waiting = ray.wait(self._unfinished, num_returns=len(self._unfinished), timeout=GRACE)
        lost = [rank for rank, future in enumerate(self._unfinished) if future in waiting or _lost_peer(rank, future)]
        if lost:
            fault = f"the model is lost: rank {lost[0]} did not return from an earlier call, in which {self._failure}"
            raise RankError(lost[0], f"{fault}. Close it, and load it again")
        self._unfinished, self._failure = [], None

    def close(self) -> None:
        """Ends the workers, gives back their resources, and stops Ray if this load started it."""
        stop(self._workers, self._group, self._started_ray)
        self._workers, self._group, self._started_ray = [], None, False


def _lost_peer(rank: int, future: Any) -> bool:
    """Returns True if a rank died, or a collective of it failed: its process group is of no use then."""
    try:
        ray.get(future)
    except ray.exceptions.RayTaskError as error:
        return isinstance(_failure(rank, error), LostPeerError)
    except ray.exceptions.RayError:
        return True
    return False


def _check_equal(answers: list[Any]) -> None:
    """Raises `RankError` unless all ranks gave rank 0's answer."""
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            raise RankError(rank, f"generated {answer!r}, rank 0 {answers[0]!r}")


class Gathering:
    """The results of a call, one from each rank, as they come.

    The error of a rank that lost its peer may arrive before the peer's own, which is then awaited for a moment.
    """

    def __init__(self, futures: list[Any]):
        self._pending = {future: rank for rank, future in enumerate(futures)}
        self._found: dict[int, Any] = {}
        self._lost: dict[int, DistquantError] = {}
        self._deadline = math.inf

    @property
    def done(self) -> bool:
        """True once there is nothing to wait for."""
        return not self._pending or time.monotonic() >= self._deadline

    def look(self, timeout: float) -> None:
        """Takes what there is, or comes within `timeout` seconds; raises a failure, as that of the rank it is of."""
        ready, _ = ray.wait(list(self._pending), timeout=timeout)
        for future in ready:
            rank = self._pending.pop(future)
            try:
                self._found[rank] = ray.get(future)
            except ray.exceptions.RayError as error:
                failure = _failure(rank, error)
                if not isinstance(failure, LostPeerError):
                    raise failure from None
                self._lost[rank] = failure
                self._deadline = min(self._deadline, time.monotonic() + GRACE)

    def results(self) -> list[Any]:
        """Returns all results in rank order, once done; raises the failure of a rank whose peer told nothing."""
        if self._lost:
            raise self._lost[min(self._lost)]
        return [self._found[rank] for rank in range(len(self._found))]


def gather(futures: list[Any], tick: Callable[[], None] | None = None) -> list[Any]:
    """Returns results in rank order; raises a failure at once, as the error of the rank that caused it."""
    gathering = Gathering(futures)
    while not gathering.done:
        gathering.look(POLL)
        if tick is not None:
            tick()
    return gathering.results()


def _failure(rank: int, error: ray.exceptions.RayError) -> DistquantError:
    """Returns the error to raise for a worker's: its own if that is one of ours."""
    if not isinstance(error, ray.exceptions.RayTaskError):
        return RankError(rank, str(error).strip().splitlines()[0])
    cause = error.cause
    return cause if isinstance(cause, DistquantError) else RankError(rank, f"{type(cause).__name__}: {cause}")


def stop(workers: list[Any], group: PlacementGroup | None, started_ray: bool) -> None:
    """Ends workers and placement group, and Ray itself where this process started it."""
    for worker in workers:
        ray.kill(worker)
    if group is not None and ray.is_initialized():
        remove_placement_group(group)
    if started_ray:
        ray.shutdown()
