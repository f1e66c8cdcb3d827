"""The old name of `distquant.quantization`, for one release."""

from __future__ import annotations

import warnings
from typing import Any

from distquant import quantization

_NAMES = ("SCHEMES", "Context", "Scheme", "Shard", "config_classes", "register", "scheme_for")


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        warnings.warn(
            f"distquant.schemes.{name} is distquant.quantization.{name} now; the old name goes with 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(quantization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
