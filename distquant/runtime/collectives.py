"""Waits for collectives, and exchanges of objects by them. A wait ends early if a rank is silent, with its name.

A collective has the timeout of its group, but it begins when this rank is ready for it: a rank that is stopped long
before would be waited for that much longer.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distquant.errors import SilentRankError
from distquant.parallel.comm import MISSED
from distquant.runtime import heartbeat
from distquant.runtime.values import from_bytes, to_bytes

LOOK = datetime.timedelta(seconds=heartbeat.EVERY)
"""Time between two looks at the other ranks while a collective is waited for."""


def finish(work: dist.Work | None, tensor: Tensor) -> None:
    """Waits for a collective over a tensor; on a device its stream does, and the host goes on.

    Raises:
        RuntimeError: it failed.
        SilentRankError: a rank was silent for the timeout.
    """
    if work is None:
        return
    if tensor.device.type != "cpu":
        work.wait()
        return
    while True:
        try:
            work.wait(LOOK)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # raises its own error, if any: it may have been done just after the last wait gave up
                return
        if (silent := silent_rank()) is not None:
            raise silent


def silent_rank(seconds: float | None = None) -> SilentRankError | None:
    """Returns the error of a rank that has been silent for so long (None: the timeout), if this process watches any."""
    beats = heartbeat.current()
    return None if beats is None else beats.silent(seconds)


@contextmanager
def silent_ranks_named() -> Iterator[None]:
    """Names the rank that is silent where a collective failed because of it, in place of the collective."""
    try:
        yield
    except RuntimeError as error:
        silent = silent_rank(MISSED) if is_lost_peer(error) else None
        if silent is None:
            raise
        raise silent from error


def share(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Returns rank 0's value on every rank of a group of all ranks that takes CPU tensors; None: the default group.

    Raises:
        RankError: the bytes that came are not a value that ranks send.
    """
    own = dist.get_rank() == 0
    data = to_bytes(value) if own else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    finish(dist.broadcast(size, 0, group, async_op=True), size)
    if not own:
        data = torch.empty(int(size), dtype=torch.uint8)
    finish(dist.broadcast(data, 0, group, async_op=True), data)
    return value if own else from_bytes(data, 0)


def collect(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every rank's value, in rank order; `group` and errors as in `share`."""
    data = to_bytes(value)
    size = torch.tensor([data.numel()])
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    finish(dist.all_gather(sizes, size, group, async_op=True), size)
    longest = max(map(int, sizes))  # backends need equal sizes
    padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
    parts = [torch.empty_like(padded) for _ in sizes]
    finish(dist.all_gather(parts, padded, group, async_op=True), padded)
    return [from_bytes(part[: int(each)], rank) for rank, (part, each) in enumerate(zip(parts, sizes, strict=True))]


def is_lost_peer(error: RuntimeError) -> bool:
    """Returns True if a collective of torch failed, as it does when another rank ends or does not answer.

    NCCL's errors have a type. Gloo raises plain RuntimeErrors: they are known by where they are raised, which is inside
    torch.distributed, or where this module waits. A collective with invalid arguments raises other types.
    """
    if isinstance(error, dist.DistError):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((name for name in reversed(modules) if name != "torch._ops"), "")  # which calls every operator
    return inner.split(".")[:2] == ["torch", "distributed"] or inner == __name__
