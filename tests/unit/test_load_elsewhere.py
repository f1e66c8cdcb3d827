"""Loads off the main thread, under asyncio, in other processes, and while the interpreter ends."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch

import distquant as dq

QUANTIZED = [("llama-gqa", "nf4"), ("qwen2-biases", "int8")]
"""Family and method."""


def fingerprint(path: str, method: str) -> str:
    return dq.fingerprint(dq.load(path, quantization_config=method))


@pytest.fixture(scope="module")
def alone(model_of: Callable[[str], str]) -> list[tuple[str, str, str]]:
    """Path, method and fingerprint of loads that nothing else runs beside."""
    loads = [(model_of(family), method) for family, method in QUANTIZED]
    return [(*load, fingerprint(*load)) for load in loads]


def test_asyncio(alone: list[tuple[str, str, str]]) -> None:
    async def gathered() -> list[str]:
        with ThreadPoolExecutor(1) as pool:
            loop = asyncio.get_running_loop()
            runs: list[Any] = [asyncio.to_thread(fingerprint, path, method) for path, method, _ in alone]
            runs += [loop.run_in_executor(pool, fingerprint, path, method) for path, method, _ in alone]
            return await asyncio.gather(*runs)

    assert asyncio.run(gathered()) == [expected for *_, expected in alone] * 2


def test_a_coroutine_that_is_cancelled_leaves_the_next_load_right(alone: list[tuple[str, str, str]]) -> None:
    """Its thread goes on to the end: Python has no way to end a thread."""
    path, method, expected = alone[0]
    begun = threading.Event()

    def load() -> str:
        begun.set()
        return fingerprint(path, method)

    async def cancelled() -> str:
        waiting = asyncio.ensure_future(asyncio.to_thread(load))
        await asyncio.to_thread(begun.wait)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return await asyncio.to_thread(fingerprint, path, method)

    dtype = torch.get_default_dtype()
    assert asyncio.run(cancelled()) == expected
    assert torch.get_default_dtype() == dtype


def test_loads_while_another_thread_generates(alone: list[tuple[str, str, str]]) -> None:
    path, method, _ = alone[0]
    model, stop = dq.load(path, quantization_config=method), threading.Event()
    prompt = torch.arange(8).reshape(1, -1)
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()

    def generate() -> list[list[list[int]]]:
        answers = []
        while not stop.is_set() or not answers:
            answers.append(model.generate(prompt, max_new_tokens=8, do_sample=False).tolist())
        return answers

    with ThreadPoolExecutor(3) as pool:
        answers = pool.submit(generate)
        loads = [pool.submit(fingerprint, path, method) for path, method, _ in alone]
        try:
            assert [load.result() for load in loads] == [expected for *_, expected in alone]
        finally:
            stop.set()
        assert all(answer == expected for answer in answers.result())


def test_a_load_off_the_main_thread_leaves_signals_alone(alone: list[tuple[str, str, str]]) -> None:
    """A handler that Python runs in the main thread meanwhile does not harm the load."""
    path, method, expected = alone[0]
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(fingerprint, path, method)
            while not load.done():
                signal.raise_signal(signal.SIGUSR1)
                load.exception(timeout=None) if len(heard) > 100 else threading.Event().wait(0.005)
            assert load.result() == expected
        assert heard
        assert handlers == {number: signal.getsignal(number) for number in handlers}
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.wide
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_processes_of_multiprocessing(alone: list[tuple[str, str, str]], method: str) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        found = [pool.submit(fingerprint, path, name) for path, name, _ in alone]
        assert [one.result() for one in found] == [expected for *_, expected in alone]


ENDING = """
    import sys, threading, time
    import distquant as dq

    PATH, METHOD, SECONDS = sys.argv[1], sys.argv[2], float(sys.argv[3])
    dq.load(PATH, quantization_config=METHOD)  # imports all that a load needs

    def load():
        while True:
            dq.load(PATH, quantization_config=METHOD)

    threading.Thread(target=load, daemon=True).start()
    time.sleep(SECONDS)
    print("the main thread ends", flush=True)
"""


@pytest.mark.wide
def test_the_interpreter_ends_while_daemon_threads_load(alone: list[tuple[str, str, str]]) -> None:
    path, method, _ = alone[0]
    command = [sys.executable, "-c", textwrap.dedent(ENDING), path, method]
    for moment in (0.02, 0.1, 0.2):
        done = subprocess.run([*command, str(moment)], capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stdout) == (0, "the main thread ends\n"), (moment, done.stderr[-2000:])
        assert "Traceback" not in done.stderr, (moment, done.stderr[-2000:])
