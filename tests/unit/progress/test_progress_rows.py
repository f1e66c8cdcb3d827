"""What people see of many ranks: rows for few, a summary and the slowest for many, as wide as there is space."""

from __future__ import annotations

import re

import pytest

from distquant.options import LoadProgress
from distquant.progress.snapshot import FEW, Snapshot, View, clock, of_bytes
from distquant.progress.targets import as_text, rendered

GIB = 1 << 30


def ranks(count: int, slow: int = -1) -> tuple[LoadProgress, ...]:
    """Ranks that have read half of 2 GiB, but for a slow one, which has read an eighth."""
    done = [GIB // (4 if rank == slow else 1) for rank in range(count)]
    return tuple(LoadProgress(each, 2 * GIB, "read" if rank % 3 else "place") for rank, each in enumerate(done))


def test_each_of_a_few_ranks_has_a_row() -> None:
    rows = Snapshot(ranks(FEW, slow=1), 4.0).rows()
    assert [row.name for row in rows] == [f"rank {number}" for number in range(FEW)]
    assert rows[1].text() == "rank 1  12% 0.25/2.00 GiB (64.00 MiB/s, limited by reading, 0:28 left)"
    assert (rows[3].limit, rows[3].left) == ("filling", "0:04 left")


@pytest.mark.parametrize("count", [FEW + 1, 64, 512])
def test_many_ranks_are_two_rows(count: int) -> None:
    whole, slowest = Snapshot(ranks(count, slow=5), 4.0).rows()
    assert whole.name == f"{count} ranks"
    assert whole.size == of_bytes(count * GIB - 3 * GIB // 4, 2 * count * GIB)
    assert whole.limit == "reading", "what most ranks are limited by"
    assert whole.left == "0:28 left", "until the last is done"
    assert (slowest.name, slowest.percent) == ("slowest: rank 5", " 12%")


def test_ranks_that_have_not_begun_are_counted() -> None:
    seen = (*ranks(10), *([LoadProgress()] * 6))
    whole, slowest = Snapshot(seen, 4.0).rows()
    assert whole.name == "16 ranks (6 waiting)"
    assert whole.left == "", "nobody knows"
    assert slowest.name == "slowest: rank 0"
    assert Snapshot((LoadProgress(), *ranks(1)), 4.0).rows()[0].text() == "rank 0   0% waiting"


def test_the_first_moments_have_no_rate() -> None:
    (row,) = Snapshot(ranks(1), 0.5).rows()
    assert (row.rate, row.left) == ("", "")
    (row,) = Snapshot((LoadProgress(GIB, GIB, "read"),), 0.5).rows()
    assert row.left == "done"
    (row,) = Snapshot((LoadProgress(0, GIB, ""),), 9.0).rows()
    assert row.text() == "rank 0   0% 0.00/1.00 GiB (0 B/s)"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("count", [1, 8, 64])
def test_rows_fit_the_terminal(width: int, count: int) -> None:
    text = as_text(rendered(View("loading", 3.0, 9.0, Snapshot(ranks(count, slow=17), 4.0)), width), width)
    lines = text.splitlines()
    assert len(lines) == (3 if count > FEW else count + 1)
    assert all(len(line) <= width for line in lines)
    assert "…" not in text
    assert lines[0].rstrip() == "loading  0:09"
    if count == 64:
        assert lines[2].startswith("slowest: rank 17")
    assert all("%" in line and re.search(r"\d:\d\d left", line) for line in lines[1:])
    assert width not in (40, 120) or ("━" in text) == (width == 120)
    assert ("limited by" not in text) and (("reading" in text or "filling" in text) or width == 40)


def test_times_and_sizes() -> None:
    assert [clock(s) for s in (0.2, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
    assert [of_bytes(*pair) for pair in ((1, 3), (1 << 20, 2 << 30), (1 << 40, 1 << 41))] == [
        "1/3 B", "0.00/2.00 GiB", "1.00/2.00 TiB",
    ]  # fmt: skip
