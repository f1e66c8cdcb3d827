"""GGUF: the block formats of llama.cpp. Names of `GgufConfig`, `transformers/utils/quantization_config.py` (5.23)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from distquant.config.base import EXTRAS, QuantizationConfig
from distquant.config.vocabulary import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufConfig(QuantizationConfig):
    """The name of a GGUF file. Each tensor has its own type, which the file's header gives."""

    quant_method: ClassVar[str] = "gguf"
    unwritten: ClassVar[frozenset[str]] = (EXTRAS | {"types", "interleaved"}) - {"dequantize"}

    gguf_file: str | None = None
    """Name of the file."""
    dequantize: bool = False
    """Load the file's quantized weights as bfloat16."""

    types: Mapping[str, str] | None = None
    """Parameter -> GGML type of its tensor, which the planner reads from the file's header."""
    interleaved: Mapping[str, int] | None = None
    """Parameter whose rows are stored with the two halves of each head interleaved -> the rows of a head."""

    def vocabulary(self) -> tuple[Precision, ...]:
        return (Precision(weight="gguf", bits=None),)
