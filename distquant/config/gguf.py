"""GGUF: the block formats of llama.cpp. Names of `GgufConfig`, `transformers/utils/quantization_config.py` (5.23)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from distquant.config.base import EXTRAS, QuantizationConfig
from distquant.config.vocabulary import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufConfig(QuantizationConfig):
    """Each tensor of the file has its own type, which its header names; the configuration knows only the file."""

    quant_method: ClassVar[str] = "gguf"
    unwritten: ClassVar[frozenset[str]] = EXTRAS - {"dequantize"}

    gguf_file: str | None = None
    """The file."""
    dequantize: bool = False
    """Load what the file stores quantized as bfloat16."""

    def vocabulary(self) -> tuple[Precision, ...]:
        return (Precision(weight="gguf", bits=None),)
