"""A model on Ray workers: one call at a time goes to all of them, and the failure of one rank ends it."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from distquant.errors import DistquantError, InputError, RankError
from distquant.planning import LoadPlan
from distquant.runtime.answer import Answer
from distquant.runtime.gathering import GRACE, POLL, Gathering, failure_of, gather, lost_peer
from distquant.runtime.query import Outcome, Query
from distquant.runtime.ray_watch import Watch
from distquant.runtime.tokens import Messages


class Sharded:
    """A model that lives on Ray workers. Use as a context manager, or `close` it.

    Any number of threads and coroutines may use it: calls wait for each other, because every call needs all workers.
    One process holds it; others send their requests to that process (for example a Ray actor, or a replica of Serve).
    """

    def __init__(
        self,
        plan: LoadPlan,
        workers: list[Any],
        group: PlacementGroup | None,
        started_ray: bool,
        watch: Watch | None = None,
    ):
        self.plan, self._workers, self._group, self._started_ray = plan, workers, group, started_ray
        self._watch = watch
        self._one_call = threading.Lock()
        self._streams = 0
        """Streams so far: the number of the last one."""
        self._unfinished: list[Any] = []
        """Results of a call that failed; other ranks may still be waiting in it."""
        self._failure: DistquantError | None = None
        self._waiting = ThreadPoolExecutor(1, "distquant-agenerate")
        """Where calls of coroutines wait: in their order, and not in the threads of their event loop."""

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

    async def agenerate(self, prompt: str | Sequence[str] | Messages, **kwargs: Any) -> Any:
        """`generate` for coroutines: the event loop goes on meanwhile. One that is cancelled while it waits is dropped.

        Raises:
            InputError: the model cannot take the messages, or its context has no room for an answer.
            RankError: ranks did not agree on the tokens.
        """
        self._check_open()
        call = functools.partial(self.generate, prompt, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._waiting, call)

    def stream(self, prompt: str | Messages, **kwargs: Any) -> Iterator[str]:
        """Yields the answer to messages, or the continuation of a prompt, in pieces as they come.

        Keyword arguments go to `generate` of transformers. Leave the loop, or `close` the iterator, to end the answer
        early. Other calls wait until the answer is complete, not until its pieces are taken.

        Raises:
            InputError: the model cannot take the messages, or its context has no room for an answer.
            RankError: ranks did not agree on the tokens.
        """
        return self.pieces(prompt, **kwargs)

    async def astream(self, prompt: str | Messages, **kwargs: Any) -> AsyncIterator[str]:
        """`stream` for coroutines: the event loop goes on between the pieces.

        Raises:
            InputError: the model cannot take the messages, or its context has no room for an answer.
            RankError: ranks did not agree on the tokens.
        """
        loop, left = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | Answer | BaseException] = asyncio.Queue()

        def put(piece: Any) -> None:
            if not left.is_set():  # the loop may have ended since
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        threading.Thread(target=self._take, args=(prompt, kwargs, put, left), daemon=True).start()
        try:
            while isinstance(piece := await pieces.get(), str):
                yield piece
            if isinstance(piece, BaseException):
                raise piece
        finally:
            left.set()

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
        answers = Gathering(futures, self._watch)
        try:
            while not answers.done:
                for piece in answers.take(self._workers[0].pieces.remote(number, POLL)):
                    put(piece)
                if left.is_set() and not stopped:
                    ray.get([worker.stop.remote(number) for worker in self._workers])
                    stopped = True
                answers.look(0)
            for piece in ray.get(self._workers[0].pieces.remote(number, 0)):
                put(piece)
            found = answers.results()
        except (ray.exceptions.RayError, DistquantError) as error:
            failure = error if isinstance(error, DistquantError) else failure_of(0, error)
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
                return gather(futures, watch=self._watch)
            except DistquantError as error:
                self._unfinished, self._failure = futures, error
                raise

    def _check_usable(self) -> None:
        """Raises if a call could not end: after `close`, or while ranks wait for one that has failed."""
        self._check_open()
        if self._failure is None:
            return
        _, waiting = ray.wait(self._unfinished, num_returns=len(self._unfinished), timeout=GRACE)
        lost = [rank for rank, future in enumerate(self._unfinished) if future in waiting or lost_peer(rank, future)]
        if lost:
            fault = f"the model is lost: rank {lost[0]} did not return from an earlier call, in which {self._failure}"
            raise RankError(lost[0], f"{fault}. Close it, and load it again")
        self._unfinished, self._failure = [], None

    def _check_open(self) -> None:
        if not self._workers:
            raise InputError.one("ray", "the model was closed", "Load it again")

    def close(self) -> None:
        """Ends the workers, gives back their resources, and stops Ray if this load started it."""
        stop(self._workers, self._group, self._started_ray, self._watch)
        self._workers, self._group, self._started_ray = [], None, False
        self._waiting.shutdown(wait=False, cancel_futures=True)


def _check_equal(answers: list[Any]) -> None:
    """Raises `RankError` unless all ranks gave rank 0's answer."""
    for rank, answer in enumerate(answers):
        if answer != answers[0]:
            raise RankError(rank, f"generated {answer!r}, rank 0 {answers[0]!r}")


def stop(workers: list[Any], group: PlacementGroup | None, started_ray: bool, watch: Watch | None = None) -> None:
    """Ends workers and placement group, and Ray itself where this process started it."""
    if watch is not None:
        watch.end_silent()
    for worker in workers:
        ray.kill(worker)
    if group is not None and ray.is_initialized():
        remove_placement_group(group)
    if started_ray:
        ray.shutdown()
