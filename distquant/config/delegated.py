"""Further methods with kernels only in other libraries: checked here, loaded by transformers.

Fields and defaults are those of `transformers/utils/quantization_config.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import QuantizationConfig
from distquant.config.checks import check_one_of, check_positive
from distquant.config.frozen import FrozenDict
from distquant.config.skipping import SkippingConfig
from distquant.config.vocabulary import Group, Precision
from distquant.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class EetqConfig(SkippingConfig):
    """EETQ: int8 with a scale for each row."""

    quant_method: ClassVar[str] = "eetq"

    weights: Literal["int8"] = "int8"
    """The dtype of quantized weights, the only choice."""

    def vocabulary(self) -> tuple[Precision, ...]:
        excluded = self.modules_to_not_convert
        return (Precision(weight="int8", bits=8, group="row", symmetric=True, excluded=excluded),)


@dataclass(frozen=True, kw_only=True, slots=True)
class BitnetConfig(SkippingConfig):
    """BitNet b1.58 (arXiv:2402.17764): weights of -1, 0 and 1."""

    quant_method: ClassVar[str] = "bitnet"

    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    """The module that replaces a linear."""
    quantization_mode: Literal["online", "offline"] = "offline"
    """`online` quantizes weights in each forward pass, `offline` stores them packed."""
    use_rms_norm: bool = False
    """Normalize activations first."""
    rms_norm_eps: float | None = 1e-6
    """Added to the variance."""

    def vocabulary(self) -> tuple[Precision, ...]:
        packed = self.quantization_mode == "offline" and self.linear_class == "bitlinear"
        return (
            Precision(
                weight="ternary",
                bits=2 if packed else 16,
                group="tensor",
                symmetric=True,
                storage_dtype="uint8" if packed else None,
                activations="dynamic",
                excluded=self.modules_to_not_convert,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarkConfig(QuantizationConfig):
    """AMD Quark: its own description, which transformers passes on unread."""

    quant_method: ClassVar[str] = "quark"
    sparse: ClassVar[frozenset[str]] = frozenset(
        {
            "global_quant_config", "layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config",
            "kv_cache_post_rope", "softmax_quant_spec", "quant_mode", "exclude", "algo_config", "export", "version",
            "log_severity_level",
        }
    )  # fmt: skip

    global_quant_config: Mapping[str, Any] | None = None
    """The default quantization of weights, inputs, outputs and biases."""
    layer_quant_config: Mapping[str, Any] | None = None
    """Pattern of modules -> their own description."""
    layer_type_quant_config: Mapping[str, Any] | None = None
    """Class of modules -> their own description."""
    kv_cache_quant_config: Mapping[str, Any] | None = None
    kv_cache_post_rope: bool | None = None
    softmax_quant_spec: Mapping[str, Any] | None = None
    quant_mode: str | None = None
    exclude: tuple[str, ...] | None = None
    """Patterns, with `*`, of modules not to convert."""
    algo_config: Mapping[str, Any] | tuple[Any, ...] | None = None
    export: Mapping[str, Any] | None = None
    """The file format of the weights."""
    version: str | None = None
    log_severity_level: int | None = None

    def vocabulary(self) -> tuple[Precision, ...]:
        own = (self.global_quant_config or {}).get("weight")
        weight = own[0] if isinstance(own, tuple) and own else own
        if not isinstance(weight, Mapping):
            return ()
        dtype = str(weight.get("dtype"))
        groups: dict[Any, Group] = {"per_tensor": "tensor", "per_channel": "row"}
        digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
        return (
            Precision(
                weight=dtype,
                bits=int(digits) if digits else None,
                group=groups.get(weight.get("qscheme"), weight.get("group_size")),
                symmetric=weight.get("symmetric"),
                excluded=self.exclude,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SinqConfig(SkippingConfig):
    """SINQ (arXiv:2509.22944): scales for rows and for columns."""

    quant_method: ClassVar[str] = "sinq"

    nbits: int = 4
    """Bits of a weight."""
    group_size: int = 64
    """Inputs of a group; a multiple of 8."""
    tiling_mode: str = "1D"
    method: Literal["sinq", "asinq"] = "sinq"
    """`asinq` is calibrated: such checkpoints can only be read."""
    _extra_kwargs: Mapping[str, Any] = FrozenDict()
    """Further arguments that transformers was given."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_positive("nbits", self.nbits)
        yield from check_positive("group_size", self.group_size)

    def vocabulary(self) -> tuple[Precision, ...]:
        excluded = self.modules_to_not_convert
        return (
            Precision(weight=f"uint{self.nbits}", bits=self.nbits, group=self.group_size, symmetric=False,
                      excluded=excluded),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class MetalConfig(SkippingConfig):
    """Affine groups as MLX packs them, for Apple's GPUs."""

    quant_method: ClassVar[str] = "metal"
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"dequantize"})

    bits: int = 4
    """Bits of a weight: 2, 4 or 8."""
    group_size: int = 64
    """Inputs that share scale and bias."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_one_of("bits", self.bits, (2, 4, 8))
        yield from check_positive("group_size", self.group_size)

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight=f"uint{self.bits}", bits=self.bits, group=self.group_size, symmetric=False,
                storage_dtype="uint32", excluded=self.modules_to_not_convert,
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmaConfig(SkippingConfig):
    """Gemma's own quantized checkpoints: bits by pattern of modules."""

    quant_method: ClassVar[str] = "gemma"

    num_bits: int = 4
    """Bits of modules that no pattern names."""
    quantize_embeddings: bool = False
    """True if embeddings are quantized as well."""
    module_quant_configs: Mapping[str, Mapping[str, Any]] | None = None
    """Regular expression, searched in module names -> `{"num_bits": 2, 4 or 8}`."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_one_of("num_bits", self.num_bits, (2, 4, 8))
        for pattern, own in (self.module_quant_configs or {}).items():
            bits = own.get("num_bits", self.num_bits)
            yield from check_one_of(f"module_quant_configs.{pattern}.num_bits", bits, (2, 4, 8))

    def vocabulary(self) -> tuple[Precision, ...]:
        def precision(bits: int, modules: tuple[str, ...] | None) -> Precision:
            excluded = self.modules_to_not_convert
            return Precision(weight=f"int{bits}", bits=bits, modules=modules, excluded=excluded)

        named = (self.module_quant_configs or {}).items()
        return (
            *(precision(own.get("num_bits", self.num_bits), (pattern,)) for pattern, own in named),
            precision(self.num_bits, None),
        )
