"""compressed-tensors: groups of modules, each with its own precision and file format.

Fields of the configuration are those of `CompressedTensorsConfig` (`transformers/utils/quantization_config.py` 5.23)
and of `QuantizationConfig` behind it (`compressed_tensors/quantization/` 0.20). Files of older versions hold keys that
0.20 drops; here they are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from distquant.config.base import EXTRAS, QuantizationConfig
from distquant.config.checks import where
from distquant.config.quantization_group import (
    Format,
    QuantizationGroup,
    known_of_args,
    known_of_group,
    matches,
    normalized_group,
    read_args,
    read_group,
)
from distquant.config.selection import ModuleSelection
from distquant.config.vocabulary import Precision
from distquant.errors import Problem, Problems
from distquant.patterns import pattern_error, shortened, too_many


def _group(weights: Mapping[str, Any], file_format: str, inputs: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Returns the fields of a configuration with one group, for all linear modules."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "config_groups": {"group_0": {**group, "format": file_format}},
        "format": file_format,
        "quantization_status": "compressed",
    }


def _int4(size: int) -> Mapping[str, Any]:
    """Returns the fields of symmetric int4 in groups of `size` inputs."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
    return _group(weights, "pack-quantized")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedTensorsConfig(QuantizationConfig):
    """Several precisions in one checkpoint (the format of vLLM and llm-compressor).

    The short name `fp8-row` (a scale for each output row) belongs to this class because it has a word for it,
    `strategy="channel"`; Hugging Face's `fp8` has only tiles and one scale for the tensor.
    """

    quant_method: ClassVar[str] = "compressed-tensors"
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"dequantize", "use_optimized_inference"})
    unwritten: ClassVar[frozenset[str]] = EXTRAS | {"use_optimized_inference"}
    sparse: ClassVar[frozenset[str]] = frozenset({"sparsity_config", "transform_config", "moe_sparsity_config"})
    record_keys: ClassVar[frozenset[str]] = frozenset({"version"})
    history: ClassVar[frozenset[str]] = frozenset(
        {"recorded", "global_compression_ratio", "quantization_status", "format"}  # each group has its own format
    )
    skip_field: ClassVar[str | None] = "ignore"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "int4": _int4(128),
        "int4-g64": _int4(64),
        "int4-g32": _int4(32),
        "fp8-row": _group(
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
    }

    config_groups: Mapping[str, Any] | None = None
    """Name -> a group; `groups` returns them typed."""
    format: Format = "dense"
    """The file format of groups that do not have their own."""
    quantization_status: Literal[
        "initialized", "calibration", "frozen", "compressed", "decompressed"
    ] = "initialized"  # fmt: skip
    """The state of the checkpoint's quantization."""
    kv_cache_scheme: Mapping[str, Any] | None = None
    """Arguments of the cache's quantization."""
    global_compression_ratio: float | None = None
    """The ratio that the tool measured."""
    ignore: tuple[str, ...] | None = None
    """Classes, exact names, or regular expressions after `re:`, left out; None leaves the choice to the model."""
    use_optimized_inference: bool = False
    """Multiply quantized weights without dequantizing them, if a kernel exists. Changes no stored bit."""
    sparsity_config: Mapping[str, Any] | None = None
    """Sparsity of the stored weights (older files)."""
    transform_config: Mapping[str, Any] | None = None
    """Rotations applied to weights and activations."""
    moe_sparsity_config: Mapping[str, Any] | None = None
    """Pruned experts."""

    @classmethod
    def _spelled(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = given.get("quantization_config")
        spelled = dict(inner if isinstance(inner, Mapping) else given)
        run_compressed = spelled.pop("run_compressed", None)
        if isinstance(run_compressed, bool):
            spelled["dequantize"] = spelled.get("dequantize") or not run_compressed
        elif run_compressed is not None:
            spelled["run_compressed"] = run_compressed
        for key in ("sparsity_config", "transform_config"):
            if spelled.get(key) == {}:
                del spelled[key]
        return spelled

    @classmethod
    def _nested(cls, given: Mapping[str, Any], unknown: dict[str, Any]) -> Mapping[str, Any]:
        groups = given.get("config_groups")
        groups = {
            name: known_of_group(group, f"config_groups.{name}", unknown)
            for name, group in (groups if isinstance(groups, Mapping) else {}).items()
        } or groups
        cache = known_of_args(given.get("kv_cache_scheme"), "kv_cache_scheme", unknown)
        own = {"config_groups": groups, "kv_cache_scheme": cache}
        return {key: own.get(key, value) for key, value in given.items()}

    def problems(self) -> list[Problem]:
        """Returns all problems of the values; entries of `ignore` are quoted as they were given."""
        problems = Problems()
        for name, group in (self.config_groups or {}).items():
            read_group(group, where(f"config_groups.{name}"), problems)
        read_args(self.kv_cache_scheme, where("kv_cache_scheme"), problems)
        problems.extend(ModuleSelection(include=self.include_modules, layers=self.layers).problems())
        if (reason := too_many(self.ignore or ())) is not None:
            problems.add(where("ignore"), reason, "Join some of them, or write module names.")
            return list(problems)
        for pattern in self.ignore or ():
            if (error := pattern_error(pattern.removeprefix("re:"))) is not None:
                reason = f"{shortened(pattern)} is not a regular expression ({error})"
                problems.add(where("ignore"), reason, "Give a module's name, or escape what is meant literally.")
        return list(problems)

    def meaning(self, name: str) -> Any:
        """Compares groups by what they do to modules: not by their names, nor by how ranges were observed."""
        if name != "config_groups":
            return QuantizationConfig.meaning(self, name)
        return frozenset(normalized_group(group, self.format) for group in self.groups.values())

    @property
    def groups(self) -> Mapping[str, QuantizationGroup]:
        """`config_groups`, typed, in order."""
        problems = Problems()
        read = {name: read_group(group, name, problems) for name, group in (self.config_groups or {}).items()}
        return {name: group for name, group in read.items() if group is not None}

    def group_of(self, name: str, class_name: str = "Linear") -> QuantizationGroup | None:
        """Returns the group of a module, or None if it is not quantized; a more specific target precedes a class."""
        if any(matches(pattern, name, class_name) for pattern in self.ignore or ()):
            return None
        matching = [
            (target == class_name, target.startswith("re:"), place)
            for place, group in enumerate(self.groups.values())
            for target in group.targets
            if matches(target, name, class_name)
        ]
        return list(self.groups.values())[min(matching)[2]] if matching else None

    @property
    def selection(self) -> ModuleSelection:
        """The modules that this converts; `ignore` in the syntax of `ModuleSelection`."""
        skip = None if self.ignore is None else tuple(map(_as_pattern, self.ignore))
        return ModuleSelection(skip=skip, include=self.include_modules, layers=self.layers)

    def vocabulary(self) -> tuple[Precision, ...]:
        precisions = []
        for group in self.groups.values():
            weights, inputs = group.weights, group.input_activations
            if weights is None:
                continue
            packed = (group.format or self.format).endswith("pack-quantized") and weights.type == "int"
            precisions.append(
                Precision(
                    weight=weights.element,
                    bits=weights.num_bits,
                    group=weights.group,
                    symmetric=weights.symmetric,
                    scale_dtype=None if weights.scale_dtype is None else weights.scale_dtype.removeprefix("torch."),
                    double_quant=weights.scope == "tensor_group",
                    storage_dtype="int32" if packed else None,
                    activations=None if inputs is None else "dynamic" if inputs.dynamic else "static",
                    modules=group.targets,
                    excluded=self.ignore,
                )
            )
        return tuple(precisions)


def _as_pattern(entry: str) -> str:
    """Converts an entry of `ignore` for `ModuleSelection`: the full name, or any name whose start matches a pattern."""
    return f"(?:{entry[3:]}).*" if entry.startswith("re:") else f"{re.escape(entry)}$"
