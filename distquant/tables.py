"""Tables of plain text, in which control characters are spelled out."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Table(str):
    """A table as plain text, which knows its cells: a terminal gets them in another form."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns columns aligned by spaces; numbers to the right."""
    names = tuple(map(printable, header))
    cells = tuple(tuple(map(printable, row)) for row in rows)
    widths = [max(len(row[i]) for row in (names, *cells)) for i in range(len(names))]
    right = columns_of_numbers(cells, len(names))

    def line(row: Sequence[str]) -> str:
        aligned = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "  ".join(aligned).rstrip()

    made = Table("\n".join([line(names), "  ".join("-" * width for width in widths), *map(line, cells)]))
    made.header, made.rows = names, cells
    return made


def columns_of_numbers(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
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


def without_controls(text: str) -> str:
    """Returns the text of an answer with its control characters spelled out, except line ends and tabs.

    A model's tokenizer may hold tokens that a terminal obeys. Spaces and joiners of other scripts stay as they are,
    unlike in `printable`.
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_CONTROLS = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
