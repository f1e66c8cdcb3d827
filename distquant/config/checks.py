"""Checks of values that many methods share; each yields what is wrong. And how messages name a field."""

from __future__ import annotations

from collections.abc import Iterable

from distquant.errors import Problem


def where(name: str) -> str:
    """How messages name a configuration field."""
    return f"quantization_config.{name}"


def one_of(field: str, value: object, allowed: Iterable[object]) -> Iterable[Problem]:
    """The value must be one of a few."""
    allowed = tuple(allowed)
    if value not in allowed:
        yield Problem(where(field), f"{value!r} is not allowed", f"Give one of {', '.join(map(repr, allowed))}.")


def positive(field: str, value: float | None, special: int | None = None, meaning: str = "") -> Iterable[Problem]:
    """The value must be above zero, None, or the one special value."""
    if value is not None and value != special and not value > 0:
        choice = f", or {special} ({meaning})" if special is not None else ""
        yield Problem(where(field), f"{value!r} is not positive", f"Give a positive number{choice}.")


def group_size(value: int | None, whole: str = "one group for a row") -> Iterable[Problem]:
    """A group must be positive or -1."""
    return positive("group_size", value, -1, whole)
