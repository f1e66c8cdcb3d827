"""The plain spelling of enum members and torch dtypes. Imports neither torch nor anything of distquant."""

from __future__ import annotations

from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """Returns the value of an enum member and the name of a torch dtype; anything else is returned unchanged."""
    if isinstance(value, Enum):
        return value.value
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    return value
