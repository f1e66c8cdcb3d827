"""Whole numbers in texts from outside: Python reads no more than 4,300 digits, and not all that `isdigit` accepts."""

from __future__ import annotations

MOST_DIGITS = 18
"""Digits at most, so that each number fits into 64 bits."""


def whole_number(text: str) -> int | None:
    """Returns the number that a text of ASCII digits spells; None for any other text, and for one too long.

    >>> whole_number("007"), whole_number("9" * 5000), whole_number("²")
    (7, None, None)
    """
    if not text.isdigit():  # most texts, asked for by the hundred thousand
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if digits.isascii() and len(digits) <= MOST_DIGITS else None
