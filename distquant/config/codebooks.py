"""Methods with learned or optimal code books, and SpQR with sparse outliers: checked here, loaded by transformers.

Fields and defaults are those of `transformers/utils/quantization_config.py` (5.23).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distquant.config.base import QuantizationConfig
from distquant.config.checks import check_one_of, check_positive, where
from distquant.config.frozen import FrozenDict
from distquant.config.records import read_record
from distquant.config.skipping import SkippingConfig
from distquant.config.vocabulary import Precision
from distquant.errors import Problem, Problems


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
            yield from check_positive(name, getattr(self, name))

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
            path = where(f"config_for_layers.{name}")
            layer = read_record(VptqLayer, own, path, problems)
            if layer is not None and not layer.is_indice_packed:
                problems.add(f"{path}.is_indice_packed", "False is not supported", "Remove it.")
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
    """Parameter -> its size, which does not follow from the other fields."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_one_of("bits", self.bits, (3,))
        yield from check_one_of("beta1", self.beta1, (16,))
        yield from check_one_of("beta2", self.beta2, (16,))

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
    """Module -> results of tuning its kernel."""

    def _value_problems(self) -> Iterable[Problem]:
        yield from check_one_of("bits", self.bits, (2, 3, 4))
        yield from check_one_of("p", self.p, (1, 2))
        yield from check_one_of("group_size", self.group_size, (64, 128, 256))
        if self.group_size > 0 and (self.hadamard_size % self.group_size or self.hadamard_size <= 0):
            reason = f"{self.hadamard_size} is not a multiple of group_size={self.group_size}"
            yield Problem(where("hadamard_size"), reason, "Give 512, the usual size.")

    def vocabulary(self) -> tuple[Precision, ...]:
        excluded = self.modules_to_not_convert
        return (Precision(weight="codebook", bits=self.bits, group=self.group_size, excluded=excluded),)
