"""Measures how long each stage of a load is busy and, if asked to, when: the events of a trace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

STAGES = ("read", "copy", "quantize", "exchange", "place")


@dataclass(frozen=True, slots=True)
class Event:
    """One step of work.

    Attributes:
        stage: one of `STAGES`.
        start, stop: seconds on the machine's monotonic clock.
        tensor: name of the tensor; "" = none in particular.
        nbytes: bytes that were moved.
    """

    stage: str
    start: float
    stop: float
    tensor: str
    nbytes: int


@dataclass
class StageTimer:
    """Busy seconds by stage. Threads may add at the same time."""

    traced: bool = False
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    events: list[Event] = field(default_factory=list)
    waited: float = 0.0
    """Seconds that quantizing and placing were idle because reads were not there yet."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, stage: str, start: float, tensor: str = "", nbytes: int = 0) -> float:
        """Counts work that began at `start` (`time.perf_counter`) and ends now; returns now."""
        now = time.perf_counter()
        with self._lock:
            self.busy[stage] += now - start
            if self.traced:
                self.events.append(Event(stage, start, now, tensor, nbytes))
        return now

    def limit(self, seconds: float) -> str:
        """Returns the stage that limits a load of `seconds` so far: the reads it waited for, or the busiest other."""
        others = {stage: busy for stage, busy in self.busy.items() if stage != "read"}
        busiest = max(others, key=lambda stage: others[stage])
        return "read" if self.waited >= max(seconds / 3, others[busiest]) else busiest
