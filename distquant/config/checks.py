"""Checks of values that many methods share; each yields problems. Also the names of fields in messages."""

from __future__ import annotations

from collections.abc import Iterable

from distquant.errors import Problem


def where(name: str) -> str:
    """Names a configuration field for messages."""
    return f"quantization_config.{name}"


def check_one_of(field: str, value: object, allowed: Iterable[object]) -> Iterable[Problem]:
    """Yields a problem unless the value is one of the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        yield Problem(where(field), f"{value!r} is not allowed", f"Give one of {', '.join(map(repr, allowed))}.")


def check_positive(field: str, value: float | None, special: int | None = None, meaning: str = "") -> Iterable[Problem]:
    """Yields a problem unless the value is positive, None, or the special value (`meaning` explains that one)."""
    if value is not None and value != special and not value > 0:
        choice = f", or {special} ({meaning})" if special is not None else ""
        yield Problem(where(field), f"{value!r} is not positive", f"Give a positive number{choice}.")


def check_group_size(value: int | None, meaning: str = "one group for a row") -> Iterable[Problem]:
    """Yields a problem unless the group size is positive, None or -1 (`meaning` explains -1)."""
    return check_positive("group_size", value, -1, meaning)
