"""bitsandbytes: NF4 and FP4 in 4 bits, LLM.int8 in 8.

transformers has one `BitsAndBytesConfig` with the fields of both and two flags. Here each kind has its own class, which
accepts the other kind's fields only at their defaults, and writes them so. Field names and defaults are those of
`transformers/utils/quantization_config.py` (5.23).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import QuantizationConfig
from distquant.config.checks import where
from distquant.config.vocabulary import Precision
from distquant.errors import Problem

_FLAGS = ("load_in_4bit", "load_in_8bit")
_ALIASES = {**{f"_{flag}": flag for flag in _FLAGS}, "modules_to_not_convert": "llm_int8_skip_modules"}


def _preset(quant_type: str, double_quant: bool) -> dict[str, Any]:
    return {
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Bnb4bitConfig(QuantizationConfig):
    """4-bit NormalFloat or Float with one absmax for each 64 weights (QLoRA, arXiv:2305.14314)."""

    quant_method: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str | None] = "load_in_4bit"
    loading_attributes: ClassVar[frozenset[str]] = frozenset(
        {"bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload"}
    )
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (_FLAGS,)
    flags: ClassVar[frozenset[str]] = frozenset(_FLAGS)
    constants: ClassVar[Mapping[str, Any]] = {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
    }
    aliases: ClassVar[Mapping[str, str]] = _ALIASES
    none_is_default: ClassVar[frozenset[str]] = frozenset({"bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"})
    skip_field: ClassVar[str | None] = "llm_int8_skip_modules"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "nf4": _preset("nf4", False),
        "nf4-dq": _preset("nf4", True),
        "fp4": _preset("fp4", False),
        "fp4-dq": _preset("fp4", True),
    }

    bnb_4bit_quant_type: Literal["fp4", "nf4"] = "fp4"
    """The code book of 16 values."""
    bnb_4bit_use_double_quant: bool = False
    """Quantize the absmax too, to 8 bits in blocks of 256 (nested quantization)."""
    bnb_4bit_compute_dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    """The dtype that weights are dequantized to for the matrix product. Changes no stored bit."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """The dtype that the packed codes are viewed as in memory and in files."""
    llm_int8_skip_modules: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""
    llm_int8_enable_fp32_cpu_offload: bool = False
    """Allow a device map to place modules on CPU or disk, unquantized. Changes only the place of weights."""

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight=self.bnb_4bit_quant_type,
                bits=4,
                group=64,
                symmetric=True,
                scale_dtype="uint8" if self.bnb_4bit_use_double_quant else "float32",
                double_quant=self.bnb_4bit_use_double_quant,
                compute_dtype=self.bnb_4bit_compute_dtype,
                storage_dtype=self.bnb_4bit_quant_storage,
                excluded=self.llm_int8_skip_modules,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Bnb8bitConfig(QuantizationConfig):
    """LLM.int8: one absmax for each output row, outlier columns in 16 bits (arXiv:2208.07339)."""

    quant_method: ClassVar[str] = "bitsandbytes"
    marker: ClassVar[str | None] = "load_in_8bit"
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload"})
    exclusive: ClassVar[tuple[tuple[str, ...], ...]] = (_FLAGS,)
    flags: ClassVar[frozenset[str]] = frozenset(_FLAGS)
    constants: ClassVar[Mapping[str, Any]] = {
        "load_in_4bit": False,
        "load_in_8bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }
    aliases: ClassVar[Mapping[str, str]] = _ALIASES
    skip_field: ClassVar[str | None] = "llm_int8_skip_modules"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"int8": {}}

    llm_int8_threshold: float = 6.0
    """Activations beyond this magnitude are multiplied in 16 bits; 0 switches it off. Changes no stored bit."""
    llm_int8_skip_modules: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""
    llm_int8_enable_fp32_cpu_offload: bool = False
    """Allow a device map to place modules on CPU or disk, unquantized. Changes only the place of weights."""
    llm_int8_has_fp16_weight: bool = False
    """Keep 16-bit main weights. Always false here: otherwise nothing would be quantized in memory."""

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight="int8",
                bits=8,
                group="row",
                symmetric=True,
                scale_dtype="float32",
                compute_dtype="float16",
                storage_dtype="int8",
                outlier_threshold=self.llm_int8_threshold or None,
                activations="dynamic",
                excluded=self.llm_int8_skip_modules,
            ),
        )

    def _value_problems(self) -> Iterable[Problem]:
        if not (math.isfinite(self.llm_int8_threshold) and self.llm_int8_threshold >= 0):
            reason = f"{self.llm_int8_threshold} is not a finite magnitude >= 0"
            yield Problem(where("llm_int8_threshold"), reason, "Give 6.0, the usual threshold, or 0 for no outliers.")
        if self.llm_int8_has_fp16_weight:
            reason = "True keeps the weights in 16 bits, so nothing would be quantized or sharded as int8"
            yield Problem(where("llm_int8_has_fp16_weight"), reason, "Remove it; train adapters, or load with 'none'.")
