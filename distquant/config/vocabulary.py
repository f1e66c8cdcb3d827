"""One vocabulary across methods: what a configuration says about weights, in words that all methods share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

Group = int | tuple[int, int] | Literal["row", "tensor"] | None
"""The weights that share a scale: a run along the inputs, a tile of `[out, in]`, a row, all; None = no such scale."""


Activations = Literal["dynamic", "static"] | None
"""How activations are quantized: with scales of each batch, with calibrated ones, or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """How some modules' weights are stored and used. None is for what a method does not have or does not say."""

    weight: str
    """What a code stands for: `int4`, `nf4`, `float8_e4m3fn`, `mxfp4`."""
    bits: float | None
    """Bits of one code, without scales."""
    group: Group = None
    """Weights that share a scale."""
    symmetric: bool | None = None
    """Whether the range is symmetric about zero, so that there is no zero point."""
    scale_dtype: str | None = None
    """The dtype of the stored scales."""
    double_quant: bool = False
    """Whether the scales are quantized as well."""
    compute_dtype: str | None = None
    """The dtype of the matrix product."""
    storage_dtype: str | None = None
    """The dtype that packed codes are stored in."""
    outlier_threshold: float | None = None
    """Activations beyond this magnitude are multiplied unquantized."""
    activations: Activations = None
    """How activations are quantized."""
    modules: tuple[str, ...] | None = None
    """Patterns, in the method's own syntax, of the modules that this is for; None = all linear modules."""
    excluded: tuple[str, ...] | None = None
    """Patterns, likewise, of modules that are left out; None leaves the choice to the model."""


NAMED = 3
"""Patterns that a cell lists; of more, the number is told."""


def columns(precisions: Sequence[Precision]) -> tuple[list[str], list[list[str]]]:
    """A table's header and rows, without the columns that say nothing of any."""
    told = [
        field.name for field in fields(Precision) if any(getattr(p, field.name) != field.default for p in precisions)
    ]
    return [name.replace("_", " ") for name in told], [[_text(getattr(p, name)) for name in told] for p in precisions]


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
