"""Methods of 4-bit floats with kernels only in other libraries: checked here, loaded by transformers.

Fields and defaults are those of `transformers/utils/quantization_config.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from distquant.config.checks import check_one_of, where
from distquant.config.skipping import SkippingConfig
from distquant.config.vocabulary import Precision
from distquant.errors import Problem


def _precision(nvfp4: bool, compute_dtype: str | None, excluded: tuple[str, ...] | None) -> Precision:
    """Returns the precision of NVFP4 or MXFP4 weights; activations are quantized on the way in both."""
    return Precision(
        weight="float4_e2m1fn",
        bits=4,
        group=16 if nvfp4 else 32,
        symmetric=True,
        scale_dtype="float8_e4m3fn" if nvfp4 else "float8_e8m0fnu",
        double_quant=nvfp4,
        compute_dtype=compute_dtype,
        activations="dynamic",
        excluded=excluded,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Nvfp4Config(SkippingConfig):
    """NVFP4: float4_e2m1 with a float8_e4m3fn for each 16 inputs and a float32 for the tensor."""

    quant_method: ClassVar[str] = "nvfp4"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nvfp4": {}}

    def vocabulary(self) -> tuple[Precision, ...]:
        return (replace(_precision(True, "bfloat16", self.modules_to_not_convert), storage_dtype="uint8"),)


@dataclass(frozen=True, kw_only=True, slots=True)
class FpQuantConfig(SkippingConfig):
    """FP-Quant (arXiv:2509.23202): MXFP4 or NVFP4 after a rotation."""

    quant_method: ClassVar[str] = "fp_quant"
    none_is_default: ClassVar[frozenset[str]] = frozenset({"modules_to_not_convert"})

    forward_dtype: Literal["nvfp4", "mxfp4"] = "nvfp4"
    """The dtype of weights and activations."""
    forward_method: Literal["abs_max", "quest"] = "abs_max"
    """The choice of scales; nvfp4 has `abs_max` only."""
    backward_dtype: Literal["bf16", "mxfp8", "mxfp4"] = "bf16"
    """The dtype of gradients; with nvfp4 they stay bf16."""
    store_master_weights: bool = False
    """Keep unquantized weights for training."""
    hadamard_group_size: int | None = None
    """Inputs that are rotated together; None = 16 with nvfp4, 32 with mxfp4."""
    pseudoquantization: bool = False
    """Compute in 16 bits with quantized values."""
    transform_init: Literal["hadamard", "identity", "gsr"] = "hadamard"
    """The first rotation."""
    modules_to_not_convert: tuple[str, ...] | None = ("lm_head",)
    """Patterns of modules not to convert."""

    def derived_fields(self) -> Mapping[str, Any]:
        size = 16 if self.forward_dtype == "nvfp4" else 32
        return {"hadamard_group_size": size} if self.hadamard_group_size is None else {}

    def _value_problems(self) -> Iterable[Problem]:
        nvfp4 = self.forward_dtype == "nvfp4"
        yield from check_one_of(
            "hadamard_group_size", self.hadamard_group_size, (16, 32, 64, 128) if nvfp4 else (32, 64, 128)
        )
        for name, only in (("forward_method", "abs_max"), ("backward_dtype", "bf16")):
            if nvfp4 and getattr(self, name) != only:
                reason = f"{getattr(self, name)!r} does not go with forward_dtype='nvfp4'"
                yield Problem(where(name), reason, f"Give {only!r}, or forward_dtype='mxfp4'.")

    def vocabulary(self) -> tuple[Precision, ...]:
        return (_precision(self.forward_dtype == "nvfp4", "bfloat16", self.modules_to_not_convert),)


@dataclass(frozen=True, kw_only=True, slots=True)
class FouroversixConfig(SkippingConfig):
    """Four Over Six (arXiv:2512.02010): NVFP4 with blocks scaled to 4 or to 6, whichever has the smaller error."""

    quant_method: ClassVar[str] = "fouroversix"

    dtype: str = "nvfp4"
    """The dtype of tensors whose own field is None."""
    scale_rule: str = "mse"
    """The choice of a block's scale: `mse`, `mae`, `abs_max`, `static_6`, `static_4`."""
    weight_dtype: str | None = None
    weight_scale_rule: str | None = None
    weight_scale_2d: bool = False
    """Scale weights in square blocks."""
    activation_dtype: str | None = None
    activation_scale_rule: str | None = None
    gradient_dtype: str | None = None
    gradient_scale_rule: str | None = None
    output_dtype: str | None = "bfloat16"
    keep_master_weights: bool = False
    """Keep unquantized weights and quantize them in each forward pass."""
    matmul_backend: str | None = None
    quantize_backend: str | None = None
    module_config_overrides: Mapping[str, Mapping[str, Any]] | None = None
    """Module -> its own fields."""
    modules_to_not_convert: tuple[str, ...] | None = ("lm_head",)
    """Patterns of modules not to convert."""

    def vocabulary(self) -> tuple[Precision, ...]:
        nvfp4 = (self.weight_dtype or self.dtype) == "nvfp4"
        return (_precision(nvfp4, self.output_dtype, self.modules_to_not_convert),)
