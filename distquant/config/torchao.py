"""torchao: one of its own configuration objects, in the form that `torchao/core/config.py` (0.18) serializes.

Fields and defaults of `TorchAoConfig` of `transformers/utils/quantization_config.py` (5.23). `quant_type` is what its
`to_dict` writes, `{"default": {"_type": ..., "_version": ..., "_data": {...}}}`; a torchao object is read as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from distquant.config.base import QuantizationConfig
from distquant.config.checks import where
from distquant.config.evidence import without_unknown
from distquant.config.frozen import FrozenDict
from distquant.config.torchao_items import item_problems
from distquant.config.vocabulary import Group, Precision
from distquant.errors import Problem

_ELEMENTS = {"Int4": "int4", "Int8": "int8", "Float8": "float8_e4m3fn"}
"""Part of a class name -> element type, for classes without a field for it."""
_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_CLASS_OF_WORD = {
    "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_weight_only": "Int8WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
    "float8_weight_only": "Float8WeightOnlyConfig",
    "float8_dynamic_activation_float8_weight": "Float8DynamicActivationFloat8WeightConfig",
}
"""Words of transformers before 4.52 -> torchao's class."""
_OLD_FIELDS = frozenset({"group_size", "set_inductor_config"})
"""Fields that the class of today has, among those that went with such a word."""


def _serialized(name: str, **data: Any) -> dict[str, Any]:
    """Returns an object of torchao 0.18, where every configuration has version 2."""
    return {"quant_type": {"default": {"_type": name, "_version": 2, "_data": data}}}


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchaoConfig(QuantizationConfig):
    """The configuration of torchao's `quantize_`."""

    quant_method: ClassVar[str] = "torchao"
    skip_field: ClassVar[str | None] = "modules_to_not_convert"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "torchao-int8": _serialized(
            "Int8WeightOnlyConfig", group_size=None, granularity=_PER_ROW, set_inductor_config=True
        ),
        "torchao-int4": _serialized(
            "Int4WeightOnlyConfig",
            group_size=128,
            set_inductor_config=True,
            int4_packing_format={"_type": "Int4PackingFormat", "_data": "PLAIN"},
            int4_choose_qparams_algorithm={"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
            int4_tile_packed_ntile=8,
        ),
        "torchao-fp8": _serialized(
            "Float8WeightOnlyConfig",
            weight_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"},
            set_inductor_config=True,
            granularity=_PER_ROW,
        ),
    }

    quant_type: Mapping[str, Any]
    """`{"default": ...}` with a serialized torchao configuration."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Patterns of modules not to convert; None leaves the choice to the model (its output head)."""
    include_input_output_embeddings: bool = False
    """Quantize embeddings and the output head as well."""
    untie_embedding_weights: bool = False
    """Give tied embeddings weights of their own before they are quantized."""

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = given.get("quant_type")
        if type(kind).__module__.startswith("torchao."):
            from torchao.core.config import config_to_dict

            return {**given, "quant_type": {"default": config_to_dict(kind)}}
        return given

    @classmethod
    def _stored(cls, given: Mapping[str, Any], unknown: dict[str, Any]) -> Mapping[str, Any]:
        """Converts what older versions wrote: a word with its arguments, or an object without a name for it."""
        kind = given.get("quant_type")
        if isinstance(kind, Mapping) and "_type" in kind:
            return {**given, "quant_type": {"default": kind}}
        if not isinstance(kind, str) or kind not in _CLASS_OF_WORD:
            return given
        rest = {key: value for key, value in given.items() if key not in ("quant_type", "quant_type_kwargs")}
        arguments = given.get("quant_type_kwargs")
        arguments = without_unknown(arguments or {}, _OLD_FIELDS, "quant_type_kwargs", unknown)
        return {**rest, **_serialized(_CLASS_OF_WORD[kind], **arguments)}

    def _value_problems(self) -> Iterable[Problem]:
        if set(self.quant_type) != {"default"}:
            reason = f"has the keys {', '.join(map(repr, self.quant_type)) or 'none'}"
            yield Problem(where("quant_type"), reason, "Give one object under 'default', as torchao serializes it.")
            return
        inner = self.quant_type["default"]
        if not isinstance(inner, Mapping) or not isinstance(inner.get("_type"), str):
            reason = f"{inner!r} is not a serialized torchao configuration"
            yield Problem(where("quant_type.default"), reason, "Give an object with _type, _version and _data.")
        elif not isinstance(inner.get("_data", FrozenDict()), Mapping):
            yield Problem(where("quant_type.default._data"), f"{inner['_data']!r} is not an object", "Give an object.")
        else:
            yield from item_problems(inner, where("quant_type.default"))

    @property
    def type_name(self) -> str:
        """The class name of torchao's configuration, such as `Int8WeightOnlyConfig`."""
        return str(self.quant_type["default"]["_type"])

    @property
    def data(self) -> Mapping[str, Any]:
        """The fields of torchao's configuration."""
        fields: Mapping[str, Any] = self.quant_type["default"].get("_data", FrozenDict())
        return fields

    def vocabulary(self) -> tuple[Precision, ...]:
        if self.type_name in ("FqnToConfig", "ModuleFqnToConfig"):
            inner = self.data.get("fqn_to_config") or self.data.get("module_fqn_to_config") or {}
            named = ((name, own) for name, own in inner.items() if own is not None)
            return tuple(self._precision(own["_type"], own.get("_data", {}), (name,)) for name, own in named)
        return (self._precision(self.type_name, self.data, None),)

    def _precision(self, name: str, data: Mapping[str, Any], modules: tuple[str, ...] | None) -> Precision:
        activations, _, weight = name.partition("Weight")[0].rpartition("Activation")  # "Int8Dynamic", "Int8"
        dtype = _value(data.get("weight_dtype")) or _ELEMENTS.get(weight)
        mapping = _value(data.get("weight_mapping_type", data.get("mapping_type", "SYMMETRIC")))
        return Precision(
            weight=dtype or name,
            bits=_bits(dtype),
            group=_granularity(data),
            symmetric=mapping == "SYMMETRIC" and name != "Int4WeightOnlyConfig",
            scale_dtype=_value(data.get("scale_dtype")),
            activations="dynamic" if "Dynamic" in activations else "static" if "Static" in activations else None,
            modules=modules,
            excluded=self.modules_to_not_convert,
        )


def _value(item: Any) -> str | None:
    """Returns the name of a serialized enum member or dtype."""
    return item.get("_data") if isinstance(item, Mapping) else item


def _bits(dtype: str | None) -> float | None:
    digits = "".join(c for c in (dtype or "").partition("_")[0] if c.isdigit())
    return int(digits) if digits else None


def _granularity(data: Mapping[str, Any]) -> Group:
    """Returns the weights that share a scale; None if `_data` does not name them."""
    size = data.get("group_size")
    if isinstance(size, int):
        return size
    given = data.get("weight_granularity", data.get("granularity"))
    given = given[-1] if isinstance(given, tuple) else given
    if not isinstance(given, Mapping):
        return "row" if "group_size" in data else None
    kind, own = given.get("_type"), given.get("_data", {})
    if kind == "PerGroup":
        return int(own["group_size"])
    if kind == "PerBlock":
        rows, columns = own["block_size"]
        return int(rows), int(columns)
    return "tensor" if kind == "PerTensor" else "row"
