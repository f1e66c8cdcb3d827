"""A pool of processes that act as ranks over gloo, kept alive through the session.

Importing torch and transformers costs seconds, so one process does it, before it has a thread or a model, and ranks are
its forks, started once; every job gets a fresh process group over a file store. A rank that fails, or a job that hangs,
fails the test and takes the whole pool with it: the next job starts a new one, and nothing is orphaned (ranks are
daemons, and end with their pipe).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    import datetime

    import torch.distributed as dist

    while True:
        try:
            function, arguments, rank, world, store, threads = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo", f"file://{store}", datetime.timedelta(seconds=300), rank=rank, world_size=world
            )
            dist.barrier()  # a rank that fails at once must not be gone while others still connect to it
            try:
                result = (True, function(*arguments))
            finally:
                dist.destroy_process_group()
        except BaseException as error:
            result = (False, (error, traceback.format_exc()))
        try:
            pipe.send(result)
        except Exception as error:
            pipe.send((False, (RuntimeError(f"unpicklable result: {error}"), "")))


IMPORTED = ["distquant", "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "bitsandbytes", "peft"]
"""What the process that ranks are forked from has imported."""


class RankFailed(AssertionError):
    """A rank raised; `error` is its exception."""

    def __init__(self, rank: int, error: BaseException, trace: str):
        super().__init__(f"rank {rank}: {error!r}\n{trace}")
        self.rank, self.error = rank, error


class Ranks:
    """`run(world, function, *arguments)` calls a module-level function on every rank and returns their results."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self._workers: list[tuple[Any, Connection]] = []

    def _start(self, count: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, world: int, function: Any, *arguments: Any, timeout: float = 600, threads: int = 1) -> list[Any]:
        self._start(world)
        pipes = [pipe for _, pipe in self._workers[:world]]
        with tempfile.TemporaryDirectory() as folder:
            for rank, pipe in enumerate(pipes):
                pipe.send((function, arguments, rank, world, os.path.join(folder, "store"), threads))
            results: dict[int, Any] = {}
            while len(results) < world:
                ready = wait([p for r, p in enumerate(pipes) if r not in results], timeout)
                if not ready:
                    self.close()
                    raise RankFailed(-1, TimeoutError(f"no answer within {timeout} s"), "")
                for pipe in ready:
                    rank = pipes.index(pipe)
                    try:
                        good, value = pipe.recv()
                    except EOFError:
                        good, value = False, (RuntimeError("the rank died"), "")
                    if not good:
                        # The others may wait for this one for ever.
                        failures = self._failures(pipes, {**results, rank: (good, value)})
                        self.close()
                        first = min(failures)
                        raise RankFailed(first, *failures[first])
                    results[rank] = (good, value)
        return [results[rank][1] for rank in range(world)]

    @staticmethod
    def _failures(pipes: list[Connection], results: dict[int, Any]) -> dict[int, Any]:
        """Failures that have arrived within a second: where all ranks raise the same, that is all of them."""
        pending = [p for r, p in enumerate(pipes) if r not in results]
        for pipe in wait(pending, 1.0) if pending else []:
            try:
                results[pipes.index(pipe)] = pipe.recv()
            except EOFError:
                continue
        return {rank: value for rank, (good, value) in results.items() if not good}

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
