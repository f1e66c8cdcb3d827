"""FP8 and MXFP8: weights as float8_e4m3fn with a scale for each tile, each run of 32, or each row.

Names and defaults of `FineGrainedFP8Config` and `FbgemmFp8Config`, `transformers/utils/quantization_config.py` (5.23).
transformers reads `mxfp8` with the class of `fp8`; here each has its own, because their layouts differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import EXTRAS, QuantizationConfig
from distquant.config.checks import where
from distquant.config.plain import plain
from distquant.config.vocabulary import Group, Precision
from distquant.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Float8Config(QuantizationConfig):
    """The fields that `fp8` and `mxfp8` share."""

    loading_attributes: ClassVar[frozenset[str]] = frozenset({"dequantize", "modules_to_not_convert"})
    aliases: ClassVar[Mapping[str, str]] = {"ignored_layers": "modules_to_not_convert"}
    unwritten: ClassVar[frozenset[str]] = EXTRAS - {"dequantize"}
    sparse: ClassVar[frozenset[str]] = frozenset({"fmt", "kv_cache_scheme"})
    record_keys: ClassVar[frozenset[str]] = frozenset(
        {"is_checkpoint_fp8_serialized", "is_checkpoint_mxfp8_serialized", "kv_cache_quant_algo"}
    )
    skip_field: ClassVar[str | None] = "modules_to_not_convert"

    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    """The scales of activations: computed for each batch, or calibrated and stored."""
    weight_block_size: tuple[int, int] | None = (128, 128)
    """The tile `[out, in]` that shares a scale; None = one scale for the tensor."""
    dequantize: bool = False
    """Load the checkpoint's quantized weights as bfloat16."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""
    modules_to_convert: tuple[str, ...] | None = None
    """Patterns of further modules to convert, such as embeddings."""
    scale_fmt: Literal["float", "ue8m0"] = "float"
    """The stored scales: fp32, or powers of two in a byte."""
    expert_dtype: Literal["fp8", "fp4"] = "fp8"
    """The dtype of the experts' weights, which may be packed FP4."""
    fmt: Literal["e4m3"] | None = None
    """The kind of float8 that DeepSeek's files name, the only choice."""
    kv_cache_scheme: str | Mapping[str, Any] | None = None
    """The quantization of the cache (AutoFP8, ModelOpt)."""

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        scheme = plain(given.get("activation_scheme"))
        return {**given, "activation_scheme": scheme.lower()} if isinstance(scheme, str) else given

    def _value_problems(self) -> Iterable[Problem]:
        if self.weight_block_size is not None and min(self.weight_block_size) <= 0:
            reason = f"invalid tile {list(self.weight_block_size)}"
            yield Problem(where("weight_block_size"), reason, "Give two positive integers, or null for the tensor.")

    def vocabulary(self) -> tuple[Precision, ...]:
        group: Group = self.weight_block_size or "tensor"
        return (
            Precision(
                weight="float8_e4m3fn",
                bits=8,
                group=self.weight_block_size[1] if self.weight_block_size and self.weight_block_size[0] == 1 else group,
                symmetric=True,
                scale_dtype="float32" if self.scale_fmt == "float" else "float8_e8m0fnu",
                storage_dtype="float8_e4m3fn",
                activations=self.activation_scheme,
                excluded=self.modules_to_not_convert,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Config(Float8Config):
    """Fine-grained FP8 (DeepSeek-V3, arXiv:2412.19437): a scale for each tile, or one for the tensor.

    `fp8-tensor` is `weight_block_size=None`, which to transformers means one scale for the weight
    (`integrations/finegrained_fp8.py`). No field can ask for one scale a row: `fp8-row` is a compressed-tensors group.
    """

    quant_method: ClassVar[str] = "fp8"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fp8": {"weight_block_size": [128, 128]},
        "fp8-tensor": {"weight_block_size": None},
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp8Config(Float8Config):
    """MXFP8 (OCP Microscaling): a power of two for each 32 inputs.

    transformers reads it with the class of `fp8`, whose defaults are another layout. Files without tile and `scale_fmt`
    (MiniMax's) mean those of the standard, which are the defaults here.
    """

    quant_method: ClassVar[str] = "mxfp8"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mxfp8": {}}

    weight_block_size: tuple[int, int] | None = (1, 32)
    """The run of inputs that shares a scale."""
    scale_fmt: Literal["float", "ue8m0"] = "ue8m0"
    """The stored scales: powers of two in a byte."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FbgemmFp8Config(QuantizationConfig):
    """FP8 with a scale for each row, as FBGEMM multiplies it."""

    quant_method: ClassVar[str] = "fbgemm_fp8"
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"activation_scale_ub"})
    skip_field: ClassVar[str | None] = "modules_to_not_convert"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fbgemm_fp8": {}}

    activation_scale_ub: float = 1200.0
    """Activations beyond this magnitude are clipped. Changes no stored bit."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""

    def _value_problems(self) -> Iterable[Problem]:
        if not self.activation_scale_ub > 0:
            reason = f"invalid magnitude {self.activation_scale_ub}"
            yield Problem(where("activation_scale_ub"), reason, "Give 1200.0, the usual bound.")

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight="float8_e4m3fn",
                bits=8,
                group="row",
                symmetric=True,
                scale_dtype="float32",
                compute_dtype="bfloat16",
                storage_dtype="float8_e4m3fn",
                activations="dynamic",
                excluded=self.modules_to_not_convert,
            ),
        )
