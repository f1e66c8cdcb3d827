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
        self.seen: list[LoadProgress] = []

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def show(self, ranks: list[LoadProgress]) -> None:
        """Takes how far every rank is that is known."""
        if not self.ranks or not ranks:
            return
        moved = [seen for seen in ranks if seen.total]
        if moved and not any(seen.total for seen in self.seen):
            self.started = time.perf_counter()
        self.seen = ranks
        now = time.perf_counter()
        if moved and now - self.last >= (EVERY if self.terminal else 10 * EVERY):
            self.last = now
            self._write("\r" if self.terminal else "", "" if self.terminal else "\n")

    def _write(self, before: str, after: str) -> None:
        seconds = max(time.perf_counter() - self.started, 1e-3)
        parts = [
            f"rank {rank} {100 * seen.done / max(seen.total, 1):3.0f}% {format_bytes(seen.done)} "
            f"({format_bytes(seen.done / seconds)}/s, {seen.limit})"
            for rank, seen in enumerate(self.seen)
        ]
        sys.stderr.write(before + "loading: " + " | ".join(parts) + after)
        sys.stderr.flush()

    def end(self) -> None:
        """Writes the final state, once."""
        if self.ranks and any(seen.total for seen in self.seen):
            self._write("\r" if self.terminal else "", "\n")
        self.seen = []
