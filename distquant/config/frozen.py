"""Nested plain data as immutable, hashable values, so that a frozen dataclass can hold a JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distquant.config.plain import plain


class FrozenDict(Mapping[str, Any]):
    """A mapping that cannot change. Its values are frozen as well, so it has a hash; equal to any equal mapping."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any] | None = None):
        self._items = {_key(key): freeze(value) for key, value in (items or {}).items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, FrozenDict):
            return self._items == other._items
        if not isinstance(other, Mapping):
            return NotImplemented
        try:
            return self._items == FrozenDict(other)._items
        except ValueError:
            return False

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(thaw(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (self._items,)


def _key(key: Any) -> str:
    key = plain(key)
    if not isinstance(key, str):
        raise ValueError(f"{key!r} is not a name")
    return key


def freeze(value: Any) -> Any:
    """Converts plain data: lists to tuples, dicts to `FrozenDict`, enum members and dtypes to strings.

    Raises:
        ValueError: JSON cannot hold something in it.
    """
    value = plain(value)
    if isinstance(value, FrozenDict) or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return FrozenDict(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(freeze, value))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(freeze, value), key=repr))
    raise ValueError(f"{value!r} ({type(value).__name__}) is not plain data")


def thaw(value: Any) -> Any:
    """Converts frozen data back to lists and dicts, as JSON has them."""
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    if isinstance(value, FrozenDict):
        return {key: thaw(item) for key, item in value.items()}
    return value
