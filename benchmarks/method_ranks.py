"""The ranks in which `methods.py quality` measures: started once, to import only once, with one thread each."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from common import SMALL, TIMEOUT, memory

LOADS = 3
"""Number of loads; their median is the result."""


@dataclass(frozen=True)
class Quality:
    """One rank's figures of a method.

    Attributes:
        seconds: seconds of each load.
        beyond: peak of resident bytes, over those before the load and those of the finished shard.
        fingerprint: fingerprint of the quantized weights.
        perplexity: perplexity on the text.
        parameters: parameters of the quantized modules, over all ranks.
        quantized_bytes: bytes of their weights, on this rank.
    """

    seconds: tuple[float, ...]
    beyond: int
    fingerprint: str
    perplexity: float
    parameters: int
    quantized_bytes: int


# -- in the ranks ------------------------------------------------------------------------------------------------------


def serve(pipe: Any, rank: int) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    while True:
        try:
            path, quant, world, text, rendezvous = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = measure(path, quant, world, text, rank, rendezvous)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pipe.send(answer)


def measure(path: str, quant: str, world: int, text: str, rank: int, rendezvous: str) -> Quality:
    if world == 1:
        return qualities(path, quant, world, text)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        return qualities(path, quant, world, text)
    finally:
        dist.destroy_process_group()


def qualities(path: str, quant: str, world: int, text: str) -> Quality:
    from transformers import AutoTokenizer

    import distquant as dq
    from distquant.errors import InputError

    def load(folder: str) -> Any:
        return dq.load(folder, quantization_config=quant, mesh=f"tp={world}", dtype="bfloat16")

    try:
        load(str(SMALL))  # imports what the method needs
    except InputError:  # a method may need larger sizes than the small model's
        load(path)
    seconds, beyond, model = [], 0, None
    for _ in range(LOADS):
        model = None
        before = clean()
        start = time.perf_counter()
        model = load(path)
        seconds.append(time.perf_counter() - start)
        report = model.distquant.report
        finished = report.quantized_bytes + report.unquantized_bytes
        beyond = max(beyond, memory("VmHWM") - before - finished)
    assert model is not None
    converted = [tensor for tensor in model.distquant.plan.tensors if tensor.scheme != "none"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Quality(
        seconds=tuple(seconds),
        beyond=beyond,
        fingerprint=dq.fingerprint(model),
        perplexity=dq.perplexity(model, tokenizer, text),
        parameters=sum(math.prod(tensor.shape) for tensor in converted),
        quantized_bytes=model.distquant.report.quantized_bytes,
    )


def clean() -> int:
    """Returns freed memory to the system and resets the high-water mark; returns the resident bytes.

    Otherwise the next load would fill memory that is resident already, and its peak would be hidden.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


# -- in the main process -------------------------------------------------------------------------------


class Ranks:
    """Processes that stay alive until one of them fails; the next measurement then starts new ones."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Any]] = []

    def measure(self, path: str, quant: str, world: int, text: str) -> list[Quality] | str:
        """Returns every rank's figures, or the failure."""
        self._start(world)
        pipes = [pipe for _, pipe in self._workers[:world]]
        with tempfile.TemporaryDirectory() as folder:
            for pipe in pipes:
                pipe.send((path, quant, world, text, os.path.join(folder, "store")))
            answers: dict[Any, Quality] = {}
            while len(answers) < world:
                failure = self._receive(answers, [pipe for pipe in pipes if pipe not in answers])
                if failure is not None:
                    self.close()
                    return failure
        return [answers[pipe] for pipe in pipes]

    def _receive(self, answers: dict[Any, Quality], waiting: list[Any]) -> str | None:
        ready = wait(waiting, TIMEOUT)
        if not ready:
            return f"no answer within {TIMEOUT} s"
        for pipe in ready:
            try:
                answer = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                return "a rank died"
            if isinstance(answer, str):
                return answer
            answers[pipe] = answer
        return None

    def _start(self, count: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        while len(self._workers) < count:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=serve, args=(theirs, len(self._workers)), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers.clear()
