"""The display of a process: who opens it, what it draws where, and when it keeps silent."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distquant.errors import InputError
from distquant.options import LoadProgress
from distquant.progress import handed_over, showing, status, working
from distquant.progress.display import TAKEN, Display
from distquant.progress.snapshot import Snapshot, View
from distquant.progress.targets import Lines, LiveTerminal, is_terminal

HALF, ALL = LoadProgress(1 << 20, 2 << 20, "read"), LoadProgress(2 << 20, 2 << 20, "read")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Recorder:
    """A target that keeps what it was asked to draw."""

    def __init__(self) -> None:
        self.drawn: list[View] = []
        self.ends: list[View] = []
        self.closed = 0

    def draw(self, view: View, at_once: bool = False) -> None:
        self.drawn.append(view)

    def end_load(self, view: View) -> None:
        self.ends.append(view)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error that is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.TextIOWrapper, list[bytes]]]:
    """A real terminal, and all that was written to it by the time that its end is closed."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    master, slave = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                seen.append(os.read(master, 4096))
            except OSError:  # all other ends are closed
                return

    reader = threading.Thread(target=read)
    reader.start()
    stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115 -- the test closes it
    yield stream, seen
    if not stream.closed:
        stream.close()
    reader.join()
    os.close(master)


# -- a log -------------------------------------------------------------------------------------------------------------


def lines_of(views: list[View]) -> list[str]:
    stream = io.StringIO()
    target = Lines(stream)
    for view in views:
        target.draw(view)
    target.end_load(views[-1])
    target.close()
    assert not CONTROL.search(stream.getvalue())
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_in_two_seconds() -> None:
    snapshots = [(tick / 10, Snapshot((HALF, HALF), tick / 10)) for tick in range(100)]
    lines = lines_of([View("loading", age, age, snapshot) for age, snapshot in snapshots])
    assert len(lines) == 5, "after 2, 4, 6 and 8 seconds, and the end"
    rank = "50% 1.00/2.00 MiB (512.00 KiB/s, limited by reading, 0:02 left)"
    assert lines[0] == f"loading: rank 0  {rank} | rank 1  {rank}"


def test_a_log_of_an_hour_has_a_line_in_ten_seconds() -> None:
    lines = lines_of([View("loading", age, age, Snapshot((HALF,), age)) for age in map(float, range(3600))])
    assert len(lines) < 400


def test_a_log_of_something_quick_is_empty() -> None:
    assert lines_of([View("loading", 0.1, 1.9, Snapshot((ALL,), 0.1))]) == []


def test_a_log_says_once_what_takes_long_and_then_rarely() -> None:
    views = [View("starting 2 workers", age / 10, age / 10) for age in range(300)]
    assert lines_of(views) == [
        "status: starting 2 workers (2 s)", "status: starting 2 workers (12 s)", "status: starting 2 workers (22 s)",
    ]  # fmt: skip


# -- a terminal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_is_drawn_over_and_left_clean(terminal, monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    stream, seen = terminal
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    assert is_terminal(stream)
    target = LiveTerminal(stream)
    target.draw(View("planning", 0.9, 0.9))
    target.draw(View("loading", 1.9, 1.9, Snapshot((HALF, ALL), 1.0)))
    target.end_load(View("loading", 1.9, 1.9))
    target.close()
    stream.close()
    for _ in range(1000):  # the other end is read by a thread
        if b"\x1b[2K" in b"".join(seen).rpartition(b"rank 1")[2]:
            break
        time.sleep(0.01)
    text = b"".join(seen).decode()
    assert "planning" in text and "rank 0" in text and "reading" in text
    coloured = re.search(r"\x1b\[[0-9;]*3[0-7]m|\x1b\[38;", text)
    assert (coloured is None) == no_color
    assert text.rfind("\x1b[2K") > text.rfind("rank 1"), "erased at the end"
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is visible"


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_draw_gets_lines(terminal, monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setenv("TERM", term)
    assert not is_terminal(terminal[0])


def test_what_is_quick_is_not_shown(terminal) -> None:
    stream, seen = terminal
    LiveTerminal.drawn = False
    target = LiveTerminal(stream)
    target.draw(View("planning", 0.1, 0.1))
    target.close()
    stream.write("end")
    stream.close()
    while b"end" not in b"".join(seen):
        pass
    assert b"".join(seen) == b"end"


# -- the display -------------------------------------------------------------------------------------------------------


def test_rates_count_from_the_first_bytes() -> None:
    now = iter(range(100))
    display = Display(Recorder(), "planning", lambda: float(next(now)))  # type: ignore[arg-type]
    display([LoadProgress(), LoadProgress()])
    assert display.view().snapshot is None
    display([HALF, LoadProgress()])
    first = display.view().snapshot
    display([HALF, HALF])
    second = display.view().snapshot
    assert first is not None and second is not None
    assert (first.seconds, second.seconds) == (1.0, 2.0)


def test_a_source_is_asked_at_the_end_and_given_up_when_it_fails() -> None:
    recorder = Recorder()
    display = Display(recorder, "loading")  # type: ignore[arg-type]
    display.follow(lambda: [ALL])
    display.end_load(done=True)
    assert [view.snapshot and view.snapshot.ranks for view in recorder.ends] == [(ALL,)]
    assert display.view().snapshot is None, "that load is over"

    def lost() -> list[LoadProgress]:
        raise RuntimeError("the store is gone")

    display([HALF])
    display.follow(lost)
    display.end_load(done=False)
    assert len(recorder.ends) == 1, "a load that failed has no end"
    display.follow(lost)
    display.end_load(done=True)
    assert display.view().snapshot is None


def test_one_display_takes_all(log: io.StringIO) -> None:
    with working("planning"), showing(None) as viewer, working("reading"):
        assert viewer is not None
        status("loading")
        assert isinstance(viewer, Display)
        assert viewer.view().status == "loading"
        with showing(False) as none, showing(len) as called:
            assert none is None and called is None
    assert not [thread for thread in threading.enumerate() if thread.name == "distquant-progress"]


def test_nothing_is_shown_where_nobody_sees_it_unless_asked_for(log: io.StringIO) -> None:
    with showing(None) as viewer:
        assert viewer is None
    with showing(True) as viewer:
        assert viewer is not None
    with showing(True, here=False) as viewer:
        assert viewer is None


def test_other_values_are_refused() -> None:
    fault = r"^progress: invalid value 'yes'\. Give True, False or a function"
    with pytest.raises(InputError, match=fault), showing("yes"):
        pass


def test_a_process_that_takes_over_is_given_the_terminal(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    display = Display(recorder, "starting 2 ranks")  # type: ignore[arg-type]
    monkeypatch.setattr("distquant.progress.display._open", [display])
    with handed_over():
        taken = Path(os.environ[TAKEN])
        assert not taken.exists()
        display._draw()
        assert len(recorder.drawn) == 1
        taken.touch()
        display._draw()
        assert (len(recorder.drawn), recorder.closed) == (1, 1)
        taken.unlink()
        display._draw()
        assert recorder.drawn[-1].status == "waiting for the ranks to end"
    assert TAKEN not in os.environ
