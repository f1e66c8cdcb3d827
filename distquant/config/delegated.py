"""Methods whose kernels are other libraries' alone: typed and checked here, loaded by transformers.

Fields and defaults are those of `transformers/utils/quantization_config.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import QuantizationConfig
from distquant.config.checks import one_of, positive, where
from distquant.config.frozen import FrozenDict
from distquant.config.records import read_record
from distquant.config.vocabulary import Group, Precision
from distquant.errors import Problem, Problems


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippingConfig(QuantizationConfig):
    """A method that lists the modules not to convert under the usual name."""

    skip_field: ClassVar[str | None] = "modules_to_not_convert"

    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Nvfp4Config(SkippingConfig):
    """NVFP4: float4_e2m1 with a float8_e4m3fn for each 16 inputs and a float32 for the tensor."""

    quant_method: ClassVar[str] = "nvfp4"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"nvfp4": {}}

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight="float4_e2m1fn",
                bits=4,
                group=16,
                symmetric=True,
                scale_dtype="float8_e4m3fn",
                double_quant=True,
                compute_dtype="bfloat16",
                storage_dtype="uint8",
                activations="dynamic",
                excluded=self.modules_to_not_convert,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EetqConfig(SkippingConfig):
    """EETQ: int8 with a scale for each row."""

    quant_method: ClassVar[str] = "eetq"

    weights: Literal["int8"] = "int8"
    """What a weight becomes; there is no other."""

    def vocabulary(self) -> tuple[Precision, ...]:
        excluded = self.modules_to_not_convert
        return (Precision(weight="int8", bits=8, group="row", symmetric=True, excluded=excluded),)


@dataclass(frozen=True, kw_only=True, slots=True)
class BitnetConfig(SkippingConfig):
    """BitNet b1.58 (arXiv:2402.17764): weights of -1, 0 and 1."""

    quant_method: ClassVar[str] = "bitnet"

    linear_class: Literal["bitlinear", "autobitlinear"] = "bitlinear"
    """The module that takes a linear's place."""
    quantization_mode: Literal["online", "offline"] = "offline"
    """Weights are quantized in each forward pass, or stored packed."""
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
class AqlmConfig(QuantizationConfig):
    """AQLM (arXiv:2401.06118): sums of vectors from learned code books."""

    quant_method: ClassVar[str] = "aqlm"
    aliases: ClassVar[Mapping[str, str]] = {"modules_to_not_convert": "linear_weights_not_to_quantize"}
    none_is_default: ClassVar[frozenset[str]] = frozenset({"linear_weights_not_to_quantize"})
    skip_field: ClassVar[str | None] = "linear_weights_not_to_quantize"

    in_group_size: int = 8
    """Inputs of a vector."""
    out_group_size: int = 1
    """Outputs of a vector."""
    num_codebooks: int = 1
    """Vectors that are added."""
    nbits_per_codebook: int = 16
    """Bits of a code."""
    linear_weights_not_to_quantize: tuple[str, ...] | None = ()
    """Full names of the weights not to convert."""

    def _value_problems(self) -> Iterable[Problem]:
        for name in ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook"):
            yield from positive(name, getattr(self, name))

    def vocabulary(self) -> tuple[Precision, ...]:
        bits = self.num_codebooks * self.nbits_per_codebook / (self.in_group_size * self.out_group_size)
        return (Precision(weight="codebook", bits=bits, excluded=self.linear_weights_not_to_quantize),)


@dataclass(frozen=True, kw_only=True, slots=True)
class VptqLayer:
    """One layer of `config_for_layers` (`VptqLayerConfig`)."""

    enable_norm: bool = True
    enable_perm: bool = True
    group_num: int = 1
    group_size: int = -1
    in_features: int = -1
    indices_as_float: bool = False
    is_indice_packed: bool = True
    num_centroids: tuple[int, ...] = (-1, -1)
    num_res_centroids: tuple[int, ...] = (-1, -1)
    out_features: int = -1
    outlier_size: int = 0
    vector_lens: tuple[int, ...] = (-1, -1)
    bias: bool | None = None
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VptqConfig(SkippingConfig):
    """VPTQ (arXiv:2409.17066): vectors from learned code books."""

    quant_method: ClassVar[str] = "vptq"

    enable_proxy_error: bool = False
    """Always false: only training needs it."""
    config_for_layers: Mapping[str, Mapping[str, Any]] = FrozenDict()
    """Module -> its fields."""
    shared_layer_config: Mapping[str, Any] = FrozenDict()
    """Fields that modules share."""

    def _value_problems(self) -> Iterable[Problem]:
        problems = Problems()
        if self.enable_proxy_error:
            problems.add(where("enable_proxy_error"), "True is for training only", "Remove it.")
        for name, own in self.config_for_layers.items():
            at = where(f"config_for_layers.{name}")
            layer = read_record(VptqLayer, own, at, problems)
            if layer is not None and not layer.is_indice_packed:
                problems.add(f"{at}.is_indice_packed", "False is not supported", "Remove it.")
        return problems

    def vocabulary(self) -> tuple[Precision, ...]:
        modules = tuple(self.config_for_layers) or None
        return (Precision(weight="codebook", bits=None, modules=modules, excluded=self.modules_to_not_convert),)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpqrConfig(SkippingConfig):
    """SpQR (arXiv:2306.03078): 3 bits in tiles of 16x16, quantized scales, and sparse outliers."""

    quant_method: ClassVar[str] = "spqr"
    none_is_default: ClassVar[frozenset[str]] = frozenset({"shapes"})

    bits: int = 3
    """Bits of a weight; only 3."""
    beta1: int = 16
    """Width of a tile; only 16."""
    beta2: int = 16
    """Height of a tile; only 16."""
    shapes: Mapping[str, Any] = FrozenDict()
    """Parameter -> its size, which the other fields do not determine."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from one_of("bits", self.bits, (3,))
        yield from one_of("beta1", self.beta1, (16,))
        yield from one_of("beta2", self.beta2, (16,))

    def vocabulary(self) -> tuple[Precision, ...]:
        return (
            Precision(
                weight="uint3", bits=3, group=(self.beta2, self.beta1), symmetric=False, double_quant=True,
                excluded=self.modules_to_not_convert,
            ),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class HiggsConfig(SkippingConfig):
    """HIGGS (arXiv:2411.17525): Hadamard-rotated groups on an optimal grid."""

    quant_method: ClassVar[str] = "higgs"
    none_is_default: ClassVar[frozenset[str]] = frozenset({"tune_metadata"})

    bits: int = 4
    """Bits of a weight: 2, 3 or 4."""
    p: int = 2
    """Dimensions of the grid: 1 or 2."""
    hadamard_size: int = 512
    """Inputs are padded to a multiple of it and rotated."""
    group_size: int = 256
    """Inputs that share a scale: 64, 128 or 256, a divisor of `hadamard_size`."""
    tune_metadata: Mapping[str, Any] = FrozenDict()
    """Module -> what tuning its kernel found."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from one_of("bits", self.bits, (2, 3, 4))
        yield from one_of("p", self.p, (1, 2))
        yield from one_of("group_size", self.group_size, (64, 128, 256))
        if self.group_size > 0 and (self.hadamard_size % self.group_size or self.hadamard_size <= 0):
            what = f"{self.hadamard_size} is no multiple of group_size={self.group_size}"
            yield Problem(where("hadamard_size"), what, "Give 512, the usual size.")

    def vocabulary(self) -> tuple[Precision, ...]:
        excluded = self.modules_to_not_convert
        return (Precision(weight="codebook", bits=self.bits, group=self.group_size, excluded=excluded),)


@dataclass(frozen=True, kw_only=True, slots=True)
class FpQuantConfig(SkippingConfig):
    """FP-Quant (arXiv:2509.23202): MXFP4 or NVFP4 after a rotation."""

    quant_method: ClassVar[str] = "fp_quant"
    none_is_default: ClassVar[frozenset[str]] = frozenset({"modules_to_not_convert"})

    forward_dtype: Literal["nvfp4", "mxfp4"] = "nvfp4"
    """What weights and activations become."""
    forward_method: Literal["abs_max", "quest"] = "abs_max"
    """How scales are chosen; nvfp4 has `abs_max` only."""
    backward_dtype: Literal["bf16", "mxfp8", "mxfp4"] = "bf16"
    """What gradients become; with nvfp4 they stay bf16."""
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

    def settled(self) -> Mapping[str, Any]:
        size = 16 if self.forward_dtype == "nvfp4" else 32
        return {"hadamard_group_size": size} if self.hadamard_group_size is None else {}

    def _value_problems(self) -> Iterable[Problem]:
        nvfp4 = self.forward_dtype == "nvfp4"
        yield from one_of(
            "hadamard_group_size", self.hadamard_group_size, (16, 32, 64, 128) if nvfp4 else (32, 64, 128)
        )
        for name, only in (("forward_method", "abs_max"), ("backward_dtype", "bf16")):
            if nvfp4 and getattr(self, name) != only:
                what = f"{getattr(self, name)!r} does not go with forward_dtype='nvfp4'"
                yield Problem(where(name), what, f"Give {only!r}, or forward_dtype='mxfp4'.")

    def vocabulary(self) -> tuple[Precision, ...]:
        nvfp4 = self.forward_dtype == "nvfp4"
        return (
            Precision(
                weight="float4_e2m1fn",
                bits=4,
                group=16 if nvfp4 else 32,
                symmetric=True,
                scale_dtype="float8_e4m3fn" if nvfp4 else "float8_e8m0fnu",
                double_quant=nvfp4,
                compute_dtype="bfloat16",
                activations="dynamic",
                excluded=self.modules_to_not_convert,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FouroversixConfig(SkippingConfig):
    """Four Over Six (arXiv:2512.02010): NVFP4 whose blocks are scaled to 4 or to 6, whichever errs less."""

    quant_method: ClassVar[str] = "fouroversix"

    dtype: str = "nvfp4"
    """What tensors become whose own field is None."""
    scale_rule: str = "mse"
    """How a block's scale is chosen: `mse`, `mae`, `abs_max`, `static_6`, `static_4`."""
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
        return (
            Precision(
                weight="float4_e2m1fn",
                bits=4,
                group=16 if nvfp4 else 32,
                symmetric=True,
                scale_dtype="float8_e4m3fn" if nvfp4 else "float8_e8m0fnu",
                double_quant=nvfp4,
                compute_dtype=self.output_dtype,
                activations="dynamic",
                excluded=self.modules_to_not_convert,
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarkConfig(QuantizationConfig):
    """AMD Quark: its own description, which transformers hands over whole."""

    quant_method: ClassVar[str] = "quark"
    sparse: ClassVar[frozenset[str]] = frozenset(
        {
            "global_quant_config", "layer_quant_config", "layer_type_quant_config", "kv_cache_quant_config",
            "kv_cache_post_rope", "softmax_quant_spec", "quant_mode", "exclude", "algo_config", "export", "version",
            "log_severity_level",
        }
    )  # fmt: skip

    global_quant_config: Mapping[str, Any] | None = None
    """How weights, inputs, outputs and biases are quantized where nothing else is said."""
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
    """How the weights lie in files."""
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
    """`asinq` is calibrated, and only read."""
    _extra_kwargs: Mapping[str, Any] = FrozenDict()
    """What transformers was given besides."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from positive("nbits", self.nbits)
        yield from positive("group_size", self.group_size)

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
        yield from one_of("bits", self.bits, (2, 4, 8))
        yield from positive("group_size", self.group_size)

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
    """Embeddings are quantized as well."""
    module_quant_configs: Mapping[str, Mapping[str, Any]] | None = None
    """Regular expression, searched in module names -> `{"num_bits": 2, 4 or 8}`."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from one_of("num_bits", self.num_bits, (2, 4, 8))
        for pattern, own in (self.module_quant_configs or {}).items():
            yield from one_of(f"module_quant_configs.{pattern}.num_bits", own.get("num_bits", self.num_bits), (2, 4, 8))

    def vocabulary(self) -> tuple[Precision, ...]:
        def precision(bits: int, modules: tuple[str, ...] | None) -> Precision:
            excluded = self.modules_to_not_convert
            return Precision(weight=f"int{bits}", bits=bits, modules=modules, excluded=excluded)

        named = (self.module_quant_configs or {}).items()
        return (
            *(precision(own.get("num_bits", self.num_bits), (pattern,)) for pattern, own in named),
            precision(self.num_bits, None),
        )
