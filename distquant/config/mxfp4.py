"""MXFP4 (OCP Microscaling). Names and defaults of `Mxfp4Config`, `transformers/utils/quantization_config.py` (5.23)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distquant.config.skipping import SkippingConfig
from distquant.config.vocabulary import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4Config(SkippingConfig):
    """MXFP4 (OCP Microscaling): float4_e2m1 with a power of two for each 32 inputs, as gpt-oss stores its experts."""

    quant_method: ClassVar[str] = "mxfp4"
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"dequantize"})
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mxfp4": {}}

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight="float4_e2m1fn",
                bits=4,
                group=32,
                symmetric=True,
                scale_dtype="float8_e8m0fnu",
                compute_dtype="bfloat16",
                storage_dtype="uint8",
                excluded=self.modules_to_not_convert,
            ),
        )
