"""Streams and events of devices, through torch's interface for any backend. Each belongs to one device.

Except for its copies, a load queues all its device work on one stream: the one that is current when the load begins,
also for the listening thread. Nothing on that stream may wait for another rank, so collectives have streams of their
own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distquant.loading.stream.load_state import LoadState

SHORTEST, LONGEST = 20e-6, 1e-3
"""Seconds between two looks at an event: at first, and at most."""


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
    """Makes a stream the current one of its device.

    Leaves the device that was current before untouched: to select it could allocate a context there.
    """
    with torch.accelerator.device_index(stream.device.index):
        before = torch.accelerator.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)


def reached(event: torch.Event, until: float, stop: Callable[[], bool] = lambda: False) -> bool:
    """Waits for an event; returns False if it is not reached by a time (`time.monotonic`), or at `stop`.

    Polls, because `Event.synchronize` cannot be interrupted.
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

    Raises the first error on any thread, and `late()` when the load's timeout is over.
    """
    if not reached(event, time.monotonic() + load_state.timeout, lambda: load_state.failure is not None):
        raise load_state.failure or late()


def await_devices(
    devices: Iterable[torch.device], load_state: LoadState, late: Callable[[torch.device], BaseException]
) -> None:
    """Waits until devices have done what is on their current streams: all of a load, once its copies are waited for.

    Not by `synchronize`, which would also wait for other work of the process, and without an end.
    """
    for device in devices:
        done = torch.accelerator.current_stream(device).record_event()
        await_event(done, load_state, lambda device=device: late(device))  # type: ignore[misc]


class Collectives:
    """Runs collectives over tensors of a load in progress.

    On a device they get a stream of their own, and the host waits. Work that is queued behind a collective would wait
    for other ranks, and these may need that very work to get there: a slot is free only when the listening thread has
    copied from it.
    """

    def __init__(self, load_state: LoadState):
        self._load_state = load_state
        self._streams = Streams()

    def run(self, collective: Callable[[Tensor], object], values: Tensor, late: Callable[[], BaseException]) -> None:
        """Calls `collective`, which changes `values` in place, and waits for the result."""
        if values.device.type == "cpu":
            collective(values)
            return
        stream = self._streams.of(values.device)
        stream.wait_stream(torch.accelerator.current_stream(values.device))
        with current(stream):
            collective(values)
        # The wait may give up while the collective still runs: the allocator must not reuse the memory before it ends.
        values.record_stream(stream)
        await_event(stream.record_event(), self._load_state, late)
