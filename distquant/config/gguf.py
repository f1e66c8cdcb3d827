"""GGUF: the block formats of llama.cpp. Names of `GgufConfig`, `transformers/utils/quantization_config.py` (5.23)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from distquant.config.base import EXTRAS, QuantizationConfig
from distquant.config.vocabulary import Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufConfig(QuantizationConfig):
    """Each tensor of the file has its own type, which its header names; the configuration knows only the file."""

    quant_method: ClassVar[str] = "gguf"
    unwritten: ClassVar[frozenset[str]] = (EXTRAS | {"types", "interleaved"}) - {"dequantize"}

    gguf_file: str | None = None
    """The file."""
    dequantize: bool = False
    """Load what the file stores quantized as bfloat16."""

    types: Mapping[str, str] | None = None
    """GGML type of each parameter's tensor, by the parameter's name: what the planner found in the file's header."""
    interleaved: Mapping[str, int] | None = None
    """Parameters whose rows are stored with the two halves of each head interleaved, and the rows of a head."""

    def vocabulary(self) -> tuple[Precision, ...]:
        return (Precision(weight="gguf", bits=None),)
