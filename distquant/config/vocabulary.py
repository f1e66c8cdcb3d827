"""One vocabulary across methods: the precision of weights in terms that all methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

Group = int | tuple[int, int] | Literal["row", "tensor"] | None
"""The weights that share a scale: a run along the inputs, a tile of `[out, in]`, a row, all; None = no such scale."""

Activations = Literal["dynamic", "static"] | None
"""The scales of activations: computed for each batch, calibrated, or None if they are not quantized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The storage and use of some modules' weights. None means that a method does not have or does not name it."""

    weight: str
    """The type of a code: `int4`, `nf4`, `float8_e4m3fn`, `mxfp4`."""
    bits: float | None
    """Bits of one code, without scales."""
    group: Group = None
    """Weights that share a scale."""
    symmetric: bool | None = None
    """True if the range is symmetric about zero, so that zero points are not needed."""
    scale_dtype: str | None = None
    """The dtype of the stored scales."""
    double_quant: bool = False
    """True if the scales are quantized as well."""
    compute_dtype: str | None = None
    """The dtype of the matrix product."""
    storage_dtype: str | None = None
    """The dtype in which packed codes are stored."""
    outlier_threshold: float | None = None
    """Activations beyond this magnitude are multiplied unquantized."""
    activations: Activations = None
    """The scales of activations."""
    modules: tuple[str, ...] | None = None
    """Patterns of the modules with this precision, in the method's own syntax; None = all linear modules."""
    excluded: tuple[str, ...] | None = None
    """Patterns of modules that are left out, likewise; None leaves the choice to the model."""


NAMED = 3
"""Patterns that a cell of a table lists; more of them are only counted."""


def columns(precisions: Sequence[Precision]) -> tuple[list[str], list[list[str]]]:
    """Returns a table's header and rows, without the columns that are empty in all rows."""
    names = [
        field.name for field in fields(Precision) if any(getattr(p, field.name) != field.default for p in precisions)
    ]
    return [name.replace("_", " ") for name in names], [[_text(getattr(p, name)) for name in names] for p in precisions]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        if value and all(isinstance(item, int) for item in value):
            return "x".join(map(str, value))
        more = f", ... ({len(value)})" if len(value) > NAMED else ""
        return ", ".join(map(str, value[:NAMED])) + more or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
