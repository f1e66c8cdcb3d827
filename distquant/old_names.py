"""Names of 0.1, which work for one release: each gives the new one, with a warning that names it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

GONE_IN = "0.3"


def warn_old_name(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that a name is the old one; by default on behalf of the caller's caller."""
    message = f"{old} is {new} now; the old name goes with {GONE_IN}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


class OldFields:
    """Base of records whose fields can still be read under their old names."""

    __slots__ = ()
    old_fields: ClassVar[Mapping[str, str]] = {}
    """Old name -> field."""

    if not TYPE_CHECKING:  # else every attribute would be known

        def __getattr__(self, name: str) -> Any:
            if name not in type(self).old_fields:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            new = type(self).old_fields[name]
            warn_old_name(f"{type(self).__name__}.{name}", new)
            return getattr(self, new)
