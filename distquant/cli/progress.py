"""Live progress of every rank, on standard error."""

from __future__ import annotations

import sys
import time

from distquant.options import LoadProgress
from distquant.units import format_bytes

EVERY = 0.2
"""Seconds between updates on a terminal; ten times that elsewhere."""


class ProgressLine:
    """Shows `rank 0 45% 1.10 GiB (2.31 GiB/s, read) | rank 1 ...`; on a terminal in place, elsewhere line by line."""

    def __init__(self, ranks: int):
        self.ranks, self.started, self.last = ranks, time.perf_counter(), 0.0
        self.terminal = sys.stderr.isatty()
        self.latest: list[LoadProgress] = []

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, ranks: list[LoadProgress]) -> None:
        """Takes the progress of the ranks that is known, and shows it if enough time has passed."""
        if not self.ranks or not ranks:
            return
        reading = any(rank.total for rank in ranks)
        # Rates count from the first bytes: ranks start at different times, and plan before they read.
        if reading and not any(rank.total for rank in self.latest):
            self.started = time.perf_counter()
        self.latest = ranks
        now = time.perf_counter()
        if reading and now - self.last >= (EVERY if self.terminal else 10 * EVERY):
            self.last = now
            self._write("\r" if self.terminal else "", "" if self.terminal else "\n")

    def _write(self, before: str, after: str) -> None:
        seconds = max(time.perf_counter() - self.started, 1e-3)
        parts = [
            f"rank {rank} {100 * each.done / max(each.total, 1):3.0f}% {format_bytes(each.done)} "
            f"({format_bytes(each.done / seconds)}/s, {each.limit})"
            for rank, each in enumerate(self.latest)
        ]
        sys.stderr.write(before + "loading: " + " | ".join(parts) + after)
        sys.stderr.flush()

    def end(self) -> None:
        """Writes the final state, once."""
        if self.ranks and any(rank.total for rank in self.latest):
            self._write("\r" if self.terminal else "", "\n")
        self.latest = []
