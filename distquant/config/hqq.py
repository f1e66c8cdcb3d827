"""HQQ: groups with float scale and zero point, from an iteration without data.

The fields are those of `HqqConfig`'s constructor (`transformers/utils/quantization_config.py` 5.23); its dict, and so
every file, holds them under `quant_config` in the form of hqq's `BaseQuantizeConfig` (`hqq/core/quantize.py` 0.2.8).
Both forms are read, the second is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from distquant.config.base import QuantizationConfig
from distquant.config.checks import check_group_size, check_one_of, where
from distquant.config.evidence import without_unknown
from distquant.config.frozen import thaw
from distquant.config.records import read_record
from distquant.config.vocabulary import Precision
from distquant.errors import Problem, Problems


@dataclass(frozen=True, kw_only=True, slots=True)
class HqqWeight:
    """The quantization of a weight (`weight_quant_params`)."""

    nbits: int = 4
    group_size: int | None = 64
    axis: int = 1
    view_as_float: bool = False
    optimize: bool = True
    """Run the iteration; otherwise groups are rounded between their least and greatest value."""
    round_zero: bool | None = None
    """Round the zero point; None rounds it at 4 bits."""
    channel_wise: bool = True

    @property
    def rounds_zero(self) -> bool:
        """True if the zero point is rounded."""
        return self.nbits == 4 if self.round_zero is None else self.round_zero

    def problems(self, prefix: str = "") -> Iterable[Problem]:
        """Yields the problems of the values."""
        yield from check_one_of(f"{prefix}nbits", self.nbits, (8, 4, 3, 2, 1))
        yield from check_one_of(f"{prefix}axis", self.axis, (0, 1))
        if self.group_size is not None:
            yield from check_group_size(self.group_size, "one group for the weight")
        if not self.channel_wise:
            yield Problem(where(f"{prefix}channel_wise"), "False is not supported", "Remove it.")

    def as_params(self) -> dict[str, Any]:
        """Returns hqq's own form."""
        weight = {
            "nbits": self.nbits,
            "channel_wise": self.channel_wise,
            "group_size": self.group_size,
            "optimize": self.optimize,
            "round_zero": self.rounds_zero,
            "axis": self.axis,
            "view_as_float": self.view_as_float,
        }
        return {
            "weight_quant_params": weight,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        }


_FIELDS = ("nbits", "group_size", "axis", "view_as_float", "optimize", "round_zero")


@dataclass(frozen=True, kw_only=True, slots=True)
class HqqConfig(QuantizationConfig):
    """Half-quadratic quantization (mobiusml.github.io/hqq_blog)."""

    quant_method: ClassVar[str] = "hqq"
    aliases: ClassVar[Mapping[str, str]] = {"modules_to_not_convert": "skip_modules"}
    none_is_default: ClassVar[frozenset[str]] = frozenset({"axis"})
    skip_field: ClassVar[str | None] = "skip_modules"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "hqq": {"nbits": 4, "group_size": 64, "axis": 1},
        **{f"hqq-g{size}": {"nbits": 4, "group_size": size, "axis": 1} for size in (128, 32)},
    }

    nbits: int = 4
    """Bits of a weight: 8, 4, 3, 2 or 1."""
    group_size: int | None = 64
    """Consecutive weights that share scale and zero point; None takes a row or column."""
    view_as_float: bool = False
    """Show packed codes as floats."""
    axis: int = 1
    """Groups run along the rows (1), or stride the weight (0)."""
    dynamic_config: Mapping[str, Mapping[str, Any]] | None = None
    """The last part of a module's name -> its own fields; all other modules are left unquantized."""
    skip_modules: tuple[str, ...] | None = ("lm_head",)
    """Patterns of modules not to convert."""
    optimize: bool = True
    """Run the iteration that fits the zero points."""
    round_zero: bool | None = None
    """Round the zero point; None rounds it at 4 bits."""

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        params = given.get("quant_config")
        if not isinstance(params, Mapping) or not all(
            isinstance(value, (Mapping, bool, type(None))) for value in params.values()
        ):
            return given
        spelled = {key: value for key, value in given.items() if key != "quant_config"}
        if "weight_quant_params" in params:
            return {**spelled, **_flat(params)}
        return {**spelled, "dynamic_config": {tag: _flat(own) for tag, own in params.items()}}

    @classmethod
    def _nested(cls, given: Mapping[str, Any], unknown: dict[str, Any]) -> Mapping[str, Any]:
        own = given.get("dynamic_config")
        if not isinstance(own, Mapping):
            return given
        known = [field.name for field in fields(HqqWeight)]
        kept = {tag: without_unknown(weight, known, f"dynamic_config.{tag}", unknown) for tag, weight in own.items()}
        return {**given, "dynamic_config": kept}

    @property
    def weight(self) -> HqqWeight:
        """The quantization of weights that `dynamic_config` does not name."""
        return HqqWeight(**{name: getattr(self, name) for name in _FIELDS})

    @property
    def dynamic(self) -> Mapping[str, HqqWeight]:
        """`dynamic_config`, typed."""
        problems = Problems()
        read = {tag: read_record(HqqWeight, own, tag, problems) for tag, own in (self.dynamic_config or {}).items()}
        return {tag: weight for tag, weight in read.items() if weight is not None}

    def derived_fields(self) -> Mapping[str, Any]:
        return {"round_zero": self.weight.rounds_zero}

    def _value_problems(self) -> Iterable[Problem]:
        yield from self.weight.problems()
        problems = Problems()
        for tag, own in (self.dynamic_config or {}).items():
            weight = read_record(HqqWeight, own, where(f"dynamic_config.{tag}"), problems)
            if weight is not None:
                problems.extend(weight.problems(f"dynamic_config.{tag}."))
        yield from problems

    def to_dict(self, *, extras: bool = False) -> dict[str, Any]:
        flat = QuantizationConfig.to_dict(self, extras=extras)
        kept = {key: value for key, value in flat.items() if key not in (*_FIELDS, "dynamic_config")}
        if self.dynamic_config is None:
            return {**kept, "quant_config": self.weight.as_params()}
        return {**kept, "quant_config": {tag: weight.as_params() for tag, weight in self.dynamic.items()}}

    def vocabulary(self) -> tuple[Precision, ...]:
        if self.dynamic_config is None:
            return (self._precision(self.weight, None),)
        return tuple(self._precision(weight, (tag,)) for tag, weight in self.dynamic.items())

    def _precision(self, weight: HqqWeight, modules: tuple[str, ...] | None) -> Precision:
        return Precision(
            weight=f"uint{weight.nbits}",
            bits=weight.nbits,
            group="row" if weight.group_size is None else weight.group_size,
            symmetric=False,
            storage_dtype="int32" if weight.nbits == 3 else "uint8",
            modules=modules,
            excluded=self.skip_modules,
        )


def _flat(params: Any) -> Any:
    """Returns the fields of hqq's own form; keys without a field are kept, so that they are reported."""
    if not isinstance(params, Mapping):
        return params
    rest = {key: value for key, value in params.items() if key != "weight_quant_params" and value}
    weight = dict(thaw(params.get("weight_quant_params")) or {})
    if weight.get("channel_wise") is True:
        del weight["channel_wise"]
    return {**weight, **rest}
