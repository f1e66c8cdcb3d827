"""Builds HTML and SVG so that text stays text: every string is escaped, unless it is `Html` already."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = {"meta", "input", "br", "link"}
"""Tags that have no end."""


class Html(str):
    """Markup that was built here, and not text from a checkpoint."""

    __slots__ = ()


def escaped(value: object) -> Html:
    """Returns text as markup. What cannot be printed, such as a mark that turns text round, is written as `\\u202e`."""
    if isinstance(value, Html):
        return value
    shown = str(value)
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return Html(html.escape(shown))


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Returns parts one after the other, as markup."""
    return Html(escaped(separator).join(map(escaped, parts)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Returns an element. Attributes are written `class_` and `aria_label`; None and False leave one out."""
    written = []
    for key, value in attributes.items():
        if value is not None and value is not False:
            attribute = key.rstrip("_").replace("_", "-")
            written.append(f" {attribute}" if value is True else f' {attribute}="{escaped(value)}"')
    start = f"<{name}{''.join(written)}>"
    return Html(start if name in VOID else f"{start}{join(children)}</{name}>")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], label: str, numbers: Sequence[str] = ()) -> Html:
    """Returns a table in a region that scrolls; the page's script makes it searchable and sortable.

    Args:
        header: names of the columns.
        rows: cells. Tags that may stay open are left open: there may be thousands of rows.
        label: name of the table, for people who hear it.
        numbers: columns that are aligned to the right.
    """
    right = [name in numbers for name in header]
    head = join(
        tag("th", name, scope="col", class_=is_right and "n") for name, is_right in zip(header, right, strict=True)
    )
    starts = ["<td class=n>" if is_right else "<td>" for is_right in right]
    body = "\n".join(
        "<tr>" + "".join(start + escaped(cell) for start, cell in zip(starts, row, strict=True)) for row in rows
    )
    whole = Html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    return tag("div", whole, class_="table", role="region", tabindex="0", aria_label=label)


def cell(shown: object, order: int) -> Html:
    """Returns the contents of a cell that is sorted by a number which it does not show, such as one in bytes."""
    return tag("data", shown, value=order)
