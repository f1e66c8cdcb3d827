"""Copies from host slots to devices, beside the devices' kernels and two in flight; nothing is copied on the CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from distquant.errors import RankError
from distquant.loading.stream.accelerator import Streams, await_event, current, reached
from distquant.loading.stream.load_state import LoadState

IN_FLIGHT = 2
"""Copies at a time; each keeps its slot until it is done."""


class Copier:
    """Copies rows to a device, and frees their slot when they are there.

    Args:
        pinned: True if the slots are pinned; else every copy is waited for at once.
        rank: this rank.
        load_state: of the load; a copy may take as long as its timeout.
    """

    def __init__(self, pinned: bool, rank: int, load_state: LoadState):
        self._pinned, self._rank, self._load_state = pinned, rank, load_state
        self._pending: deque[tuple[torch.device, torch.Event, Callable[[], None]]] = deque()
        self._streams = Streams()

    def to_device(self, rows: Tensor, device: torch.device, free: Callable[[], None]) -> Tensor:
        """Returns the rows on the device; on the CPU the rows themselves, and `free` is not called."""
        if device.type == "cpu":
            return rows
        if not self._pinned:
            copy = rows.to(device)
            free()
            return copy
        while len(self._pending) >= IN_FLIGHT:
            self._free_oldest()
        # A stream of its own lets this copy run while kernels still work on the piece before.
        stream, compute = self._streams.of(device), torch.accelerator.current_stream(device)
        with current(stream):
            copy = rows.to(device, non_blocking=True)
        copied = stream.record_event()
        compute.wait_event(copied)
        # The memory belongs to the copy stream. Without this, the allocator could give it to the next copy while
        # kernels of the compute stream still read from it.
        copy.record_stream(compute)
        self._pending.append((device, copied, free))
        return copy

    def _free_oldest(self) -> None:
        device, copied, free = self._pending[0]

        def late() -> RankError:
            return RankError(self._rank, f"a copy to {device} was not done within {self._load_state.timeout:g} s")

        await_event(copied, self._load_state, late)
        self._pending.popleft()
        free()

    def drain(self) -> None:
        """Waits for all copies."""
        while self._pending:
            self._free_oldest()

    def close(self, until: float) -> bool:
        """Waits for copies that still read from the slots, which are not handed out again.

        Returns:
            True if all are done by a time (of `time.monotonic`).
        """
        while self._pending and reached(self._pending[0][1], until):
            self._pending.popleft()
        return not self._pending
