"""Copies from host slots to a device: on a GPU beside its kernels, two in flight; on the CPU there is none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Copies whose slots are not free yet."""


class Copier:
    """Moves rows to a device, and frees their slot when they are there."""

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self._pending: deque[tuple[Any, Callable[[], None]]] = deque()
        self._stream: Any = None

    def to_device(self, rows: Tensor, device: torch.device, free: Callable[[], None]) -> Tensor:
        """The rows on the device; on the CPU the rows themselves, and `free` is not called."""
        if device.type == "cpu":
            return rows
        if device.type != "cuda" or not self.pinned:
            moved = rows.to(device)
            free()
            return moved
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        while len(self._pending) >= IN_FLIGHT:
            self._free_oldest()
        with torch.cuda.stream(self._stream):
            moved = rows.to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        moved.record_stream(current)
        self._pending.append((event, free))
        return moved

    def _free_oldest(self) -> None:
        event, free = self._pending.popleft()
        event.synchronize()
        free()

    def drain(self) -> None:
        """Waits for all copies."""
        while self._pending:
            self._free_oldest()

    def close(self) -> None:
        """Waits for copies that still read from the slots; their slots are not handed out again."""
        while self._pending:
            self._pending.popleft()[0].synchronize()
