"""Text for people on standard output and standard error: tables and errors, in colours on a terminal, plain elsewhere.

Nothing that comes from a checkpoint is taken for markup, and its control characters do not reach a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distquant.errors import DistquantError, InputError, Problem
from distquant.progress.targets import is_terminal

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console, RenderableType
    from rich.text import Text


class Table(str):
    """A table as plain text, which knows its cells: a terminal gets them in another form."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns columns aligned by spaces; numbers to the right."""
    names = tuple(map(printable, header))
    cells = tuple(tuple(map(printable, row)) for row in rows)
    widths = [max(len(row[i]) for row in (names, *cells)) for i in range(len(names))]
    right = _right(cells, len(names))

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(aligned).rstrip()

    made = Table("\n".join([line(names), "  ".join("-" * width for width in widths), *map(line, cells)]))
    made.header, made.rows = names, cells
    return made


def _right(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Returns, for each column, True if it holds numbers."""
    return [all(row[i][:1].isdigit() for row in rows) if rows else False for i in range(columns)]


def printable(text: str) -> str:
    """Returns a name or value with its control characters and other invisible ones spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Returns a text of several lines with its control characters spelled out, except ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def show(*parts: str) -> None:
    """Prints lines and tables on standard output."""
    if not is_terminal(sys.stdout):
        print("\n".join(parts))
        return
    console = _console(sys.stdout)
    for part in parts:
        console.print(_rich_table(part) if isinstance(part, Table) else _text(part))


def show_error(error: DistquantError | str, prefix: str = "") -> None:
    """Prints an error on standard error; on a terminal its problems as a list with aligned parts."""
    if not is_terminal(sys.stderr):
        print(f"distquant: {prefix}{error}", file=sys.stderr)
        return
    console = _console(sys.stderr)
    problems = error.problems if isinstance(error, InputError) else ()
    first = _text("distquant: ", "bold red")
    if not problems:
        console.print(first + _text(f"{prefix}{error}"))
    elif len(problems) == 1:
        console.print(first + _text(prefix) + _text(problems[0].where, "bold"))
        console.print(_parts(problems[0], "  "))
    else:
        console.print(first + _text(f"{prefix}{len(problems)} problems"))
        for number, problem in enumerate(problems, 1):
            mark = f"{number:3}. "
            console.print(_text(mark) + _text(problem.where, "bold"))
            console.print(_parts(problem, " " * len(mark)))


def _parts(problem: Problem, indent: str) -> RenderableType:
    """Returns the problem and what to do about it, one below the other."""
    from rich.table import Table as RichTable

    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(_text(f"{indent}problem", "red"), _text(problem.what))
    grid.add_row(_text(f"{indent}fix", "green"), _text(problem.fix))
    return grid


def _rich_table(plain: Table) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable

    made = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name, right in zip(plain.header, _right(plain.rows, len(plain.header)), strict=True):
        made.add_column(_text(name), justify="right" if right else "left", overflow="fold")
    for row in plain.rows:
        made.add_row(*map(_text, row))
    return made


def _text(text: str, style: str = "") -> Text:
    """Returns data as text of rich, which has no markup."""
    from rich.text import Text

    return Text(printable_lines(text), style=style, overflow="fold")


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, markup=False, emoji=False)
