"""Host memory in which a rank with a device gathers what comes in parts, so that it goes to the device once a tensor.

Statistics that every rank needs, and columns of every row, come from all ranks of a node in tens of
thousands of small pieces. One copy to the device for each would take longer than to read the checkpoint.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from distquant.loading.stream.accelerator import reached
from distquant.loading.stream.staging_buffer import StagingBuffer

SMALLEST = 64 << 10
"""Bytes of a block, at least. Blocks have sizes of powers of two, so that few are made for many tensors."""


class Block:
    """Pinned memory that one component of one tensor is gathered in."""

    def __init__(self, nbytes: int, device: torch.device):
        self.device, self._buffer = device, StagingBuffer(1, nbytes)
        self._buffer.pin(device)
        self.memory: Tensor = self._buffer.memory
        """uint8 `[nbytes]`, rounded up to whole pages."""
        self.used: torch.Event | None = None
        """Reached when the device has copied what was gathered last."""

    def keep(self) -> None:
        """Keeps the memory until the process ends: a device may still copy from it."""
        self._buffer.keep()

    def close(self) -> None:
        """Gives the memory back."""
        del self.memory
        self._buffer.close()


class GatheringMemory:
    """Blocks of pinned memory, which are used again. Any thread may take one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[Block] = set()
        self._free: defaultdict[tuple[int, torch.device], list[Block]] = defaultdict(list)

    def take(self, nbytes: int, device: torch.device) -> Block:
        """Returns a block of at least so many bytes, whose content is arbitrary, for copies to a device."""
        size = max(SMALLEST, 1 << (nbytes - 1).bit_length())
        with self._lock:
            free = self._free[size, device]
            ready = next((block for block in free if block.used is None or block.used.query()), None)
            if ready is None:
                ready = Block(size, device)
            else:
                free.remove(ready)
            self._taken.add(ready)
            return ready

    def give_back(self, blocks: Iterable[Block]) -> None:
        """Takes blocks back whose copies are queued on the current streams of their devices."""
        with self._lock:
            for block in blocks:
                block.used = torch.accelerator.current_stream(block.device).record_event()
                self._taken.remove(block)
                self._free[len(block.memory), block.device].append(block)

    def close(self, until: float) -> bool:
        """Gives all memory back, when the devices no longer copy from it; call it on the thread that gave blocks back.

        Returns:
            True if all copies are done by a time (of `time.monotonic`); if not, their memory stays.
        """
        taken = list(self._taken)
        self.give_back(taken)  # of a load that has failed: copies may be queued
        done = True
        for blocks in self._free.values():
            for block in blocks:
                if block.used is None or reached(block.used, until):
                    block.close()
                else:
                    block.keep()
                    done = False
        self._free.clear()
        return done
