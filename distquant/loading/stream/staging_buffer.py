"""The staging memory of a rank: a fixed number of equal slots, reused, in memory that the ranks of a node can share.

A slot is held once for every piece in it, and once for every rank that still has to copy from it. It is free again when
the count is back at zero. The machine gives a page only when it is first written to, so slots that are never used cost
nothing.
"""

from __future__ import annotations

import mmap
import os
import threading

import torch
from torch import Tensor

from distquant.accelerator.host_memory import HostRegistration
from distquant.planning.slots import PAGE

IN_USE: set[StagingBuffer] = set()
"""Buffers that a device may copy from. They stay mapped until they are closed, even if the engine is gone."""


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
        self._registration: HostRegistration | None = None
        """With a device that copies from the memory, if any."""

    def slot(self, index: int) -> Tensor:
        """uint8 `[slot_bytes]`."""
        return self.memory[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def pin(self, device: torch.device) -> str:
        """Pins the memory for copies to a device; returns why that failed, or "". Copies from it work all the same."""
        self._registration = HostRegistration(self.memory, device)
        if self._registration.pinned:
            IN_USE.add(self)
        return self._registration.failure

    def keep(self) -> None:
        """Keeps the memory mapped until the process ends: a device or thread may still use it."""
        IN_USE.add(self)

    def close(self) -> None:
        """Gives the memory back. Views of it must not be used any more."""
        IN_USE.discard(self)
        if self._registration is not None:
            self._registration.release()
        del self.memory
        if self.fd is not None:
            # Frees the pages even if something still refers to the mapping, such as a traceback that is kept. A read
            # there then finds zeros.
            self._map.madvise(mmap.MADV_REMOVE)
            os.close(self.fd)
            self.fd = None


class Slots:
    """Hands out slots of a staging buffer, and takes them back when their last hold is released."""

    def __init__(self, indices: range, watch: threading.Condition):
        self._free = list(indices)
        self._held: dict[int, int] = {}
        self._watch = watch

    @property
    def any_free(self) -> bool:
        """True if a slot can be taken."""
        return bool(self._free)

    def take(self, count: int) -> int:
        """Takes a free slot and holds it `count` times; call with the condition held and a slot free."""
        index = self._free.pop()
        self._held[index] = count
        return index

    def hold(self, index: int, count: int) -> None:
        """Holds a slot that is taken `count` times more."""
        with self._watch:
            self._held[index] += count

    def release(self, index: int, count: int = 1) -> None:
        """Releases `count` holds on a slot."""
        with self._watch:
            self._held[index] -= count
            if self._held[index] == 0:
                del self._held[index]
                self._free.append(index)
                self._watch.notify_all()
