"""The staging memory of a rank: a fixed number of equal slots, reused, in memory that ranks of one node can share.

A slot is taken, counted once for every piece in it and every rank that still has to copy from it, and free again when
the count is back at zero. Memory that is never written to is never taken from the machine.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distquant.planning.slots import PAGE


class StagingBuffer:
    """`slots` slots of `slot_bytes` bytes."""

    def __init__(self, slots: int, slot_bytes: int):
        self.slot_bytes = -(-slot_bytes // PAGE) * PAGE
        self.slots = slots
        self.fd = os.memfd_create("distquant-staging") if hasattr(os, "memfd_create") else None
        size = max(self.slot_bytes * slots, PAGE)
        if self.fd is None:
            self._map = mmap.mmap(-1, size)
        else:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._runtime: Any = None
        """What has pinned it."""

    def slot(self, index: int) -> Tensor:
        """uint8 `[slot_bytes]`."""
        return self.memory[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def pin(self, device: torch.device) -> bool:
        """Pins the memory for copies to a device, if its backend offers that in CUDA's way; whether it is pinned."""
        runtime = getattr(torch.get_device_module(device), "cudart", None)
        if runtime is None:
            return False
        with torch.accelerator.device_index(device.index):
            code = runtime().cudaHostRegister(self.memory.data_ptr(), self.memory.numel(), 0)
        if int(code) == 0:
            self._runtime = runtime()
            IN_USE.add(self)
        return int(code) == 0

    def keep(self) -> None:
        """Leaves the memory as it is to the end of the process: somebody may still read or write there."""
        IN_USE.add(self)

    def close(self) -> None:
        """Gives the memory back. Views of it must not be used any more."""
        IN_USE.discard(self)
        if self._runtime is not None:
            self._runtime.cudaHostUnregister(self.memory.data_ptr())
        del self.memory
        if self.fd is not None:
            # Frees the pages though something may still refer to the mapping (a traceback that is kept, say). Whoever
            # reads there finds zeros.
            self._map.madvise(mmap.MADV_REMOVE)
            os.close(self.fd)
            self.fd = None


IN_USE: set[StagingBuffer] = set()
"""Arenas that a device may copy from: they stay mapped, whatever becomes of an engine, until they are closed."""


class Slots:
    """Hands out slots of an arena, and takes them back when nobody needs them any more."""

    def __init__(self, indices: range, watch: threading.Condition):
        self._free = list(indices)
        self._held: dict[int, int] = {}
        self._watch = watch

    @property
    def any_free(self) -> bool:
        return bool(self._free)

    def take(self, count: int) -> int:
        """A free slot, held `count` times; call with the condition held and a slot free."""
        index = self._free.pop()
        self._held[index] = count
        return index

    def hold(self, index: int, count: int) -> None:
        with self._watch:
            self._held[index] += count

    def release(self, index: int, count: int = 1) -> None:
        """Gives back some of the holds on a slot."""
        with self._watch:
            self._held[index] -= count
            if self._held[index] == 0:
                del self._held[index]
                self._free.append(index)
                self._watch.notify_all()


class LoadState:
    """What the threads of a load tell each other: one condition, and the first thing that went wrong."""

    def __init__(self, timeout: float):
        self.watch = threading.Condition()
        self.timeout = timeout
        self.beats = 0
        """Grows with whatever arrives: who waits is patient while it does."""
        self.failure: BaseException | None = None
        self.stopped = False

    def fail(self, error: BaseException) -> None:
        with self.watch:
            if self.failure is None:
                self.failure = error
            self.watch.notify_all()

    def stop(self) -> None:
        """Ends all threads that wait."""
        with self.watch:
            self.stopped = True
            self.watch.notify_all()

    def wait(self, ready: Callable[[], bool], late: Callable[[], BaseException]) -> bool:
        """Waits, with the condition held, until `ready`; False if the load was stopped meanwhile.

        Raises what went wrong anywhere, and `late()` when nothing has arrived for the timeout.
        """
        while True:
            seen = self.beats
            done = self.watch.wait_for(lambda: ready() or self.stopped or self.failure is not None, self.timeout)
            if self.failure is not None:
                raise self.failure
            if done:
                return not self.stopped
            if self.beats == seen:
                raise late()
