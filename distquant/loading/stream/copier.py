"""Copies between host slots and devices, beside the devices' kernels; nothing is copied on the CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from distquant.errors import RankError
from distquant.loading.stream.accelerator import Streams, await_event, current, reached
from distquant.loading.stream.load_state import LoadState

IN_FLIGHT = 2
"""Copies to a device at a time; each keeps its slot until it is done."""


class Copier:
    """Copies rows to a device, and frees their slot when they are there. Copies from a device what others get.

    Args:
        pinned: True if the slots are pinned; else every copy is waited for at once.
        rank: this rank.
        load_state: of the load; a copy may take as long as its timeout.
    """

    def __init__(self, pinned: bool, rank: int, load_state: LoadState):
        self._pinned, self._rank, self._load_state = pinned, rank, load_state
        self._pending: deque[tuple[torch.device, torch.Event, Callable[[], None]]] = deque()
        self._streams, self._back = Streams(), Streams()
        """Of copies to each device, and of those from it: both ways run at once."""
        self._written: dict[torch.device, torch.Event] = {}
        """Event after the last copy from each device."""

    def to_device(self, rows: Tensor, device: torch.device, free: Callable[[], None]) -> Tensor:
        """Returns the rows on the device; on the CPU the rows themselves, and `free` is not called."""
        if device.type == "cpu":
            return rows
        if not self._pinned:
            copy = rows.to(device)
            free()
            return copy
        while self._pending and (len(self._pending) >= IN_FLIGHT or self._pending[0][1].query()):
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

    def from_device(self, copies: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> torch.Event | None:
        """Begins to copy from a device into slots, when what its current stream has to do is done.

        Args:
            copies: (memory of a slot, values on the device).
            device: the device.

        Returns:
            what is reached when all values are there; None if they are there now.
        """
        if not self._pinned:
            for slot, values in copies:
                slot.copy_(values)
            return None
        stream = self._back.of(device)
        stream.wait_stream(torch.accelerator.current_stream(device))
        with current(stream):
            for slot, values in copies:
                slot.copy_(values, non_blocking=True)
                values.record_stream(stream)
        self._written[device] = stream.record_event()
        return self._written[device]

    def await_written(self, event: torch.Event, device: torch.device) -> None:
        """Waits for copies from a device."""
        await_event(event, self._load_state, lambda: self._late("from", device))

    def _late(self, way: str, device: torch.device) -> RankError:
        seconds = f"{self._load_state.timeout:g} s"
        return RankError(self._rank, f"a copy {way} {device} was not done within {seconds}")

    def _free_oldest(self) -> None:
        device, copied, free = self._pending[0]
        await_event(copied, self._load_state, lambda: self._late("to", device))
        self._pending.popleft()
        free()

    def drain(self) -> None:
        """Waits for all copies."""
        while self._pending:
            self._free_oldest()

    def close(self, until: float) -> bool:
        """Waits for copies that still read from the slots, which are not handed out again, or write to them.

        Returns:
            True if all are done by a time (of `time.monotonic`).
        """
        while self._pending and reached(self._pending[0][1], until):
            self._pending.popleft()
        return not self._pending and all(reached(event, until) for event in self._written.values())
