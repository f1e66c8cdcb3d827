"""The field that most methods share: a list of the modules not to convert, under the usual name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distquant.config.base import QuantizationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippingConfig(QuantizationConfig):
    """A method that lists the modules not to convert under the usual name."""

    skip_field: ClassVar[str | None] = "modules_to_not_convert"

    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""
