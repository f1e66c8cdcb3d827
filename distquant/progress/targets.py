"""The places that progress is drawn on: a terminal, a notebook, a log."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from distquant.progress.snapshot import Row, View, clock

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import RenderableType
    from rich.live import Live

AFTER = 0.5
"""Seconds until a terminal shows what is being done: what is faster needs no words."""

LOG_EVERY, LOG_LATER, LOG_EARLY = 2.0, 10.0, 60.0
"""Seconds between lines of a log: in the first minute, and after it."""

COLUMNS = ("name", "percent", "size", "rate", "limit", "left")
"""Cells of a row; the bar stands after the first."""

LESS_NEEDED = ("size", "rate", "limit")
"""Columns that a narrow terminal does without, in this order."""

GAP, SHORTEST_BAR, LONGEST_BAR = 2, 6, 40
"""Characters between two columns, and of a bar."""

STYLES = {"percent": "bold", "limit": "cyan"}


def is_terminal(stream: TextIO) -> bool:
    """Returns True if lines can be drawn over on a stream."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown", "")


def in_notebook() -> bool:
    """Returns True in a notebook (Jupyter and its like), whose kernel can replace what it has displayed."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None else None
    return found is not None and getattr(found, "kernel", None) is not None


class Lines:
    """A log: a line when there is news, at most one in two seconds, and no control codes."""

    def __init__(self, stream: TextIO):
        self._stream, self._last, self._wrote = stream, 0.0, False
        self._status = ""

    def draw(self, view: View, at_once: bool = False) -> None:
        every = LOG_EVERY if view.age < LOG_EARLY else LOG_LATER
        waited = view.age - self._last
        if view.snapshot is not None:
            if waited >= every:
                self._write(view, view.snapshot.line())
        elif waited >= LOG_EVERY and (view.status != self._status or waited >= LOG_LATER):
            since = f" ({view.since:.0f} s)" if view.since >= 1 else ""
            self._write(view, f"status: {view.status}{since}")

    def end_load(self, view: View) -> None:
        """Writes the final state of a load that has been written about."""
        if self._wrote and view.snapshot is not None:
            self._write(view, view.snapshot.line())
        self._wrote = False

    def close(self) -> None:
        pass

    def _write(self, view: View, line: str) -> None:
        self._last, self._status = view.age, view.status
        self._wrote = self._wrote or view.snapshot is not None
        self._stream.write(line + "\n")
        self._stream.flush()


class LiveTerminal:
    """A terminal: the status, and a bar for each rank, drawn over in place and gone at the end."""

    drawn = False
    """True if something has been drawn: what comes next is shown without a gap."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._live: Live | None = None

    def draw(self, view: View, at_once: bool = False) -> None:
        if self._live is None:
            if view.age < AFTER and not at_once and not LiveTerminal.drawn:
                return
            LiveTerminal.drawn = True
            self._live = self._begin()
        self._live.update(rendered(view, self._live.console.width), refresh=True)

    def _begin(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            # What others print meanwhile goes above the rows; what goes to a file or pipe stays there.
            redirect_stdout=is_terminal(sys.stdout),
            redirect_stderr=is_terminal(sys.stderr),
        )
        live.start()
        console.show_cursor(True)  # a rank may be killed while it draws, and nobody would bring the cursor back
        return live

    def end_load(self, view: View) -> None:
        """Draws how far the ranks came, though a quick load ended between two drawings."""
        if self._live is not None and view.snapshot is not None:
            self._live.update(rendered(view, self._live.console.width), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class Notebook:
    """The output of a notebook's cell, replaced as the load goes on."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._last = 0.0

    def draw(self, view: View, at_once: bool = False) -> None:
        if not at_once and (view.age < AFTER or view.age - self._last < AFTER):
            return
        self._last = view.age
        self._replace(view)

    def end_load(self, view: View) -> None:
        if self._handle is not None and view.snapshot is not None:
            self._replace(view)

    def close(self) -> None:
        pass

    def _replace(self, view: View) -> None:
        from IPython.display import display

        content = {"text/plain": as_text(rendered(view, 100))}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def as_text(renderable: RenderableType, width: int = 100) -> str:
    """Returns something of rich's as plain text."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().rstrip("\n")


def rendered(view: View, width: int) -> RenderableType:
    """Returns the status with its seconds, and below it a row for each rank, as wide as the terminal."""
    from rich.console import Group
    from rich.text import Text

    seconds = clock(view.age if view.snapshot is not None else view.since)
    status = Text.assemble((view.status, "bold"), f"  {seconds}", overflow="ellipsis", no_wrap=True)
    if view.snapshot is None:
        return status
    return Group(status, _table(view.snapshot.rows(), width))


def _table(rows: list[Row], width: int) -> RenderableType:
    """Returns the rows in as many columns as the terminal is wide enough for; a bar takes the space that is left."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    widths = {name: max(len(getattr(row, name)) for row in rows) for name in COLUMNS}
    for name in LESS_NEEDED:
        if sum(widths.values()) + GAP * len(widths) > width:
            del widths[name]
    bar = min(width - sum(widths.values()) - GAP * (len(widths) + 1), LONGEST_BAR)
    table = Table.grid(padding=(0, GAP, 0, 0))
    for name in widths:
        table.add_column(no_wrap=True, justify="right" if name in ("percent", "size", "rate") else "left")
        if name == "name" and bar >= SHORTEST_BAR:
            table.add_column(width=bar)
    for row in rows:
        cells: list[RenderableType] = [Text(getattr(row, name), style=STYLES.get(name, "")) for name in widths]
        if bar >= SHORTEST_BAR:
            cells.insert(1, ProgressBar(total=1.0, completed=row.fraction, width=bar))
        table.add_row(*cells)
    return table
