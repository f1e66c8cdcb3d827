"""Text for people on standard output and standard error: tables and errors, in colours on a terminal, plain elsewhere.

Nothing that comes from a checkpoint is taken for markup, and its control characters do not reach a terminal.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from distquant.errors import DistquantError, InputError, Problem
from distquant.progress.targets import is_terminal
from distquant.tables import Table, columns_of_numbers, printable_lines

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console, RenderableType
    from rich.text import Text


def show(*parts: str) -> None:
    """Prints lines and tables on standard output."""
    if not is_terminal(sys.stdout):
        print("\n".join(map(printable_lines, parts)))
        return
    console = _console(sys.stdout)
    for part in parts:
        console.print(_rich_table(part) if isinstance(part, Table) else _text(part))


def show_error(error: DistquantError | str, prefix: str = "") -> None:
    """Prints an error on standard error; on a terminal its problems as a list with aligned parts."""
    if not is_terminal(sys.stderr):
        print(printable_lines(f"distquant: {prefix}{error}"), file=sys.stderr)
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
    for name, right in zip(plain.header, columns_of_numbers(plain.rows, len(plain.header)), strict=True):
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
