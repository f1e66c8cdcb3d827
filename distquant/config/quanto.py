"""optimum-quanto: rows in 8 bits, groups in 4 and 2.

Fields and defaults of `QuantoConfig`, `transformers/utils/quantization_config.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import QuantizationConfig
from distquant.config.vocabulary import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantoConfig(QuantizationConfig):
    """int8 and float8 have a scale for each row; int4 and int2 scale and shift for groups of 128 inputs or fewer."""

    quant_method: ClassVar[str] = "quanto"
    skip_field: ClassVar[str | None] = "modules_to_not_convert"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "quanto-int8": {"weights": "int8"},
        "quanto-int4": {"weights": "int4"},
    }

    weights: Literal["float8", "int8", "int4", "int2"] = "int8"
    """The dtype of quantized weights."""
    activations: Literal["int8", "float8"] | None = None
    """The dtype of activations; transformers loads only models without it."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""

    def vocabulary(self) -> tuple[Precision, ...]:
        grouped = self.weights in ("int4", "int2")
        return (
            Precision(
                weight={"float8": "float8_e4m3fn", "int8": "int8", "int4": "uint4", "int2": "uint2"}[self.weights],
                bits=int(self.weights[-1]),
                group=128 if grouped else "row",
                symmetric=not grouped,
                storage_dtype="uint8" if grouped else "float8_e4m3fn" if self.weights == "float8" else "int8",
                activations=None if self.activations is None else "static",
                excluded=self.modules_to_not_convert,
            ),
        )
