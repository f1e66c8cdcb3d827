"""How long each stage of a load was busy, and, if asked for, when: the events of a trace."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

STAGES = ("read", "copy", "quantize", "exchange", "place")


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of work: seconds on the machine's monotonic clock, and the bytes that it moved."""

    stage: str
    start: float
    stop: float
    what: str
    nbytes: int


@dataclass
class StageTimer:
    """Busy seconds by stage. Threads may add at the same time."""

    traced: bool = False
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    events: list[Event] = field(default_factory=list)
    waited: float = 0.0
    """Seconds that quantizing and placing had nothing to do because reads were not there yet."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, stage: str, start: float, what: str = "", nbytes: int = 0) -> float:
        """Counts work that began at `start` (`time.perf_counter`) and ends now; returns now."""
        now = time.perf_counter()
        with self._lock:
            self.busy[stage] += now - start
            if self.traced:
                self.events.append(Event(stage, start, now, what, nbytes))
        return now

    def limit(self, seconds: float) -> str:
        """The stage that held the load back in its `seconds` so far: the reads it waited for, or the busiest other."""
        others = {stage: busy for stage, busy in self.busy.items() if stage != "read"}
        busiest = max(others, key=lambda stage: others[stage])
        return "read" if self.waited >= max(seconds / 3, others[busiest]) else busiest
