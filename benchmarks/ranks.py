"""Measures a contestant of `load.py` once: fresh processes, a common start, every rank's figures."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints import drop, reader, total_bytes
from common import SMALL, TIMEOUT, memory
from contestants import Contestant, Measured
from systems import SYSTEMS, own_memory

# -- in the measured processes -----------------------------------------------------------------------------------------


def rank_main(pipe: Any, path: str, contestant: Contestant, rank: int, port: int) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(contestant.threads), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    if contestant.ranks > 1:
        ranks = str(contestant.ranks)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        pipe.send(measure(path, contestant, rank, f"tcp://127.0.0.1:{port}"))
    except (Exception, SystemExit) as error:
        pipe.send(f"{type(error).__name__}: {error}")


def measure(path: str, contestant: Contestant, rank: int, url: str) -> Measured:
    """Times a run after importing everything and loading the small example model once."""
    import logging

    import torch

    torch.set_num_threads(contestant.threads)
    logging.disable(logging.WARNING)
    if contestant.ranks == 1:
        return timed(path, contestant, rank, lambda: None)
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=contestant.ranks)
    try:
        return timed(path, contestant, rank, dist.barrier)
    finally:
        dist.destroy_process_group()


def timed(path: str, contestant: Contestant, rank: int, barrier: Callable[[], object]) -> Measured:
    system = SYSTEMS[contestant.system]
    system(contestant.small or str(SMALL), contestant, rank)()
    run = system(path, contestant, rank)
    gc.collect()
    touch_memory(total_bytes(path) * 5 // 4 // contestant.ranks, barrier)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, owned = memory("VmRSS"), own_memory()
    barrier()
    start = time.perf_counter()
    figures = run()
    seconds = time.perf_counter() - start
    barrier()
    own = None if figures.own is None else figures.own - owned
    return replace(figures, seconds=seconds, memory=memory("VmHWM") - before, own=own)


def touch_memory(nbytes: int, barrier: Callable[[], object]) -> None:
    """Allocates and frees memory, so that the machine has it when the clock starts.

    A virtual machine may have returned free memory to its host, and its first user would wait for the host.
    """
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken.madvise(mmap.MADV_HUGEPAGE)  # the host takes large blocks
        for page in range(0, nbytes, mmap.PAGESIZE):
            taken[page] = 1
        barrier()


# -- in the main process -------------------------------------------------------------------------------


def one_run(path: str, contestant: Contestant) -> list[Measured]:
    """Returns every rank's figures; a rank that fails ends the benchmark."""
    if contestant.cold:
        drop(path)
    else:
        reader(path, 2)()
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(contestant.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, path, contestant, rank, port), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    answers = []
    try:
        for rank, pipe in enumerate(pipes):
            answer = pipe.recv() if pipe.poll(TIMEOUT) else f"no answer within {TIMEOUT} s"
            if isinstance(answer, str):
                sys.exit(f"{contestant.name}, rank {rank}: {answer}")
            answers.append(answer)
    except EOFError:
        sys.exit(f"{contestant.name}: a rank died")
    finally:
        for process in processes:
            process.join(0 if len(answers) < len(processes) else 30)
            process.kill()
    return answers
