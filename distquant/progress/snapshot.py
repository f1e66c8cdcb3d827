"""The progress of all ranks at one moment: rates, time left, the slowest rank; and the same as a line of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distquant.options import LoadProgress
from distquant.units import format_bytes

FEW = 8
"""Ranks that are shown one by one; of more, all together and the slowest."""

SURE = 1.0
"""Seconds after which a rate is worth showing."""

STAGE_WORDS = {
    "read": "reading",
    "copy": "copying",
    "quantize": "quantizing",
    "exchange": "exchanging",
    "place": "filling",
}
"""Stages of a load in words for people; reports and traces have the keys."""


def stage_word(stage: str) -> str:
    """Returns the word for a stage."""
    return STAGE_WORDS.get(stage, stage)


def clock(seconds: float) -> str:
    """Returns a duration as `0:07`, `12:30` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def of_bytes(done: int, total: int) -> str:
    """Returns two sizes in the unit of the greater one: `1.20/4.00 GiB`."""
    whole, unit = format_bytes(total).split()
    power = ("B", "KiB", "MiB", "GiB", "TiB").index(unit)
    part = done / 1024**power
    return f"{part:.2f}/{whole} {unit}" if power else f"{done}/{total} B"


@dataclass(frozen=True, slots=True)
class Row:
    """One rank, or all together, in words; a cell is empty where nothing is known yet."""

    name: str
    fraction: float
    size: str
    """Bytes so far and in all."""
    rate: str
    limit: str
    left: str

    @property
    def percent(self) -> str:
        return f"{100 * self.fraction:3.0f}%"

    def text(self) -> str:
        """Returns the row as plain text."""
        limit = f"limited by {self.limit}" if self.limit else ""
        details = ", ".join(filter(None, (self.rate, limit, self.left)))
        return f"{self.name} {self.percent} {self.size}" + (f" ({details})" if details else "")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Progress of every rank that is known, `seconds` after the first bytes."""

    ranks: tuple[LoadProgress, ...]
    seconds: float

    def rows(self) -> list[Row]:
        """Returns a row for each rank, or one for all and one for the slowest where there are many."""
        if len(self.ranks) <= FEW:
            return [self._row(f"rank {number}", each) for number, each in enumerate(self.ranks)]
        return [self._summary(), *self._slowest()]

    def line(self) -> str:
        """Returns the rows as one line for a log."""
        return "loading: " + " | ".join(row.text() for row in self.rows())

    def _row(self, name: str, each: LoadProgress) -> Row:
        if not each.total:
            return Row(name, 0.0, "waiting", "", "", "")
        rate = each.done / max(self.seconds, 1e-3)
        return Row(
            name,
            each.done / each.total,
            of_bytes(each.done, each.total),
            self._rate(rate),
            stage_word(each.limit),
            self._left([(each.total - each.done, rate)]),
        )

    def _summary(self) -> Row:
        """Returns all ranks in one row; the time left is that of the rank that will take longest."""
        reading = [each for each in self.ranks if each.total]
        done, total = sum(each.done for each in reading), sum(each.total for each in reading)
        limits = Counter(each.limit for each in reading if each.limit and each.done < each.total)
        waiting = len(self.ranks) - len(reading)
        size = of_bytes(done, total) if reading else "waiting"
        speeds = [(each.total - each.done, each.done / max(self.seconds, 1e-3)) for each in reading]
        return Row(
            f"{len(self.ranks)} ranks" + (f" ({waiting} waiting)" if waiting and reading else ""),
            done / total if total else 0.0,
            size,
            self._rate(done / max(self.seconds, 1e-3)) if reading else "",
            stage_word(limits.most_common(1)[0][0]) if limits else "",
            "" if waiting else self._left(speeds),
        )

    def _rate(self, rate: float) -> str:
        """Returns a rate; nothing in the first moments, when it means nothing."""
        return f"{format_bytes(rate)}/s" if self.seconds >= SURE else ""

    def _left(self, speeds: Sequence[tuple[float, float]]) -> str:
        """Returns the time left until the last of ranks is done, from the bytes that are left and the rate of each."""
        if all(not left for left, _ in speeds):
            return "done"
        if self.seconds < SURE or any(not rate for _, rate in speeds):
            return ""
        return f"{clock(max(left / rate for left, rate in speeds))} left"

    def _slowest(self) -> list[Row]:
        """Returns the row of the rank that has done least of its work, among those that have begun."""
        reading = [(each.done / each.total, number) for number, each in enumerate(self.ranks) if each.total]
        if not reading:
            return []
        _, number = min(reading)
        return [self._row(f"slowest: rank {number}", self.ranks[number])]


@dataclass(frozen=True, slots=True)
class View:
    """All that there is to show."""

    status: str
    since: float
    """Seconds since the status is so."""
    age: float
    """Seconds since the display was opened."""
    snapshot: Snapshot | None = None
