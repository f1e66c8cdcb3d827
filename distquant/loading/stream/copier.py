"""Copies from host slots to devices: beside their kernels, two in flight; on the CPU there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from distquant.errors import RankError
from distquant.loading.stream.accelerator import Streams, await_event, current, reached
from distquant.loading.stream.staging_buffer import LoadState

IN_FLIGHT = 2
"""Copies whose slots are not free yet."""


class Copier:
    """Moves rows to a device, and frees their slot when they are there.

    Args:
        pinned: whether the slots are; else a copy is waited for at once.
        rank: this rank.
        board: of the load; a copy may take as long as its timeout.
    """

    def __init__(self, pinned: bool, rank: int, load_state: LoadState):
        self._pinned, self._rank, self._board = pinned, rank, load_state
        self._pending: deque[tuple[torch.device, torch.Event, Callable[[], None]]] = deque()
        self._streams = Streams()

    def to_device(self, rows: Tensor, device: torch.device, free: Callable[[], None]) -> Tensor:
        """The rows on the device; on the CPU the rows themselves, and `free` is not called."""
        if device.type == "cpu":
            return rows
        if not self._pinned:
            moved = rows.to(device)
            free()
            return moved
        while len(self._pending) >= IN_FLIGHT:
            self._free_oldest()
        stream, used = self._streams.of(device), torch.accelerator.current_stream(device)
        with current(stream):
            moved = rows.to(device, non_blocking=True)
        copied = stream.record_event()
        used.wait_event(copied)
        moved.record_stream(used)
        self._pending.append((device, copied, free))
        return moved

    def _free_oldest(self) -> None:
        device, copied, free = self._pending[0]

        def late() -> RankError:
            return RankError(self._rank, f"a copy to {device} was not done within {self._board.timeout:g} s")

        await_event(copied, self._board, late)
        self._pending.popleft()
        free()

    def drain(self) -> None:
        """Waits for all copies."""
        while self._pending:
            self._free_oldest()

    def close(self, until: float) -> bool:
        """Waits for copies that still read from the slots, which are not handed out again.

        Returns:
            Whether all are done by a time (of `time.monotonic`).
        """
        while self._pending and reached(self._pending[0][1], until):
            self._pending.popleft()
        return not self._pending
