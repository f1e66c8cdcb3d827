"""Streams and events of devices, in torch's words for any backend. Every stream and event belongs to one device.

Whatever a load asks of a device beside its copies goes, in one order, to the stream that is current when it begins,
also what the listening thread asks. Nothing there may wait for another rank, so collectives have streams of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distquant.loading.stream.staging_buffer import LoadState

SHORTEST, LONGEST = 20e-6, 1e-3
"""Seconds between looks at an event: at first, and when it takes long."""


class Streams:
    """One stream for each device, made when it is first asked for."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def of(self, device: torch.device) -> torch.Stream:
        if device not in self._streams:
            self._streams[device] = torch.Stream(device=device)
        return self._streams[device]


@contextmanager
def current(stream: torch.Stream) -> Iterator[None]:
    """Makes a stream its device's current one. The device before is not touched: that could cost memory there."""
    with torch.accelerator.device_index(stream.device.index):
        before = torch.accelerator.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)


def reached(event: torch.Event, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
    """Waits until a device has reached an event; False if it has not by a time (`time.monotonic`), or at `stop`.

    `Event.synchronize` cannot be given up.
    """
    pause = SHORTEST
    while not event.query():
        if stop() or time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, LONGEST)
    return True


def await_event(event: torch.Event, load_state: LoadState, late: Callable[[], BaseException]) -> None:
    """Waits until a device has reached an event.

    Raises what went wrong anywhere, and `late()` when the load's timeout is over.
    """
    if not reached(event, time.monotonic() + load_state.timeout, lambda: load_state.failure is not None):
        raise load_state.failure or late()


class Collectives:
    """Runs collectives over what a load has in work.

    On a device they get a stream of their own, and the host waits: what ran behind a collective would wait for ranks
    that may need just that to get there (a slot, which is free when the listening thread has copied from it).
    """

    def __init__(self, load_state: LoadState):
        self._board = load_state
        self._streams = Streams()

    def run(self, collective: Callable[[Tensor], object], values: Tensor, late: Callable[[], BaseException]) -> None:
        """Calls `collective` with values, which are what it makes of them afterwards."""
        if values.device.type == "cpu":
            collective(values)
            return
        stream = self._streams.of(values.device)
        stream.wait_stream(torch.accelerator.current_stream(values.device))
        with current(stream):
            collective(values)
        values.record_stream(stream)  # it may be given up, and work on
        await_event(stream.record_event(), self._board, late)
