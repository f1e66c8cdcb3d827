"""compressed-tensors: groups of modules, each with its own precision and file format.

Fields of the configuration are those of `CompressedTensorsConfig` (`transformers/utils/quantization_config.py` 5.23)
and of `QuantizationConfig` behind it; fields of groups those of `QuantizationScheme` and `QuantizationArgs`
(`compressed_tensors/quantization/` 0.20). Files of older versions hold keys that 0.20 drops; here they are kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from distquant.config.base import EXTRAS, QuantizationConfig
from distquant.config.checks import where
from distquant.config.records import read_record
from distquant.config.selection import ModuleSelection
from distquant.config.vocabulary import Group, Precision
from distquant.errors import Problem, Problems

Format = Literal[
    "dense", "fakequant", "sparse-bitmask", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized",
    "pack-quantized", "marlin-24", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp6-pack-quantized", "mxfp8-quantized",
]  # fmt: skip
"""How a group's weights lie in files."""

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationArgs:
    """How one tensor of a group is quantized."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    """Elements of a group; -1 or None with a strategy that has none."""
    strategy: Strategy | None = None
    """Which elements share a scale; None follows from `group_size`, see `scope`."""
    block_structure: tuple[int, int] | str | None = None
    """The tile of the strategy `block`."""
    dynamic: bool | Literal["local"] = False
    """Scales are taken at run time; `local` only those of groups, not the tensor's."""
    actorder: bool | Literal["group", "weight", "static", "dynamic"] | None = None
    """Columns were quantized in the order of activation size; with `group` (older files) groups are permuted."""
    scale_dtype: str | None = None
    zp_dtype: str | None = None
    observer: str | None = None
    observer_kwargs: Mapping[str, Any] | None = None

    @property
    def scope(self) -> str:
        """The strategy, or the one that follows from the group size."""
        if self.strategy is not None:
            return self.strategy
        return "tensor" if self.group_size is None else "channel" if self.group_size == -1 else "group"

    @property
    def block(self) -> tuple[int, int] | None:
        """The tile `(rows, columns)`, which older files write as `"128x128"`."""
        if isinstance(self.block_structure, str):
            tile = re.fullmatch(r"(\d+)x(\d+)", self.block_structure)
            return (int(tile[1]), int(tile[2])) if tile else None
        return self.block_structure

    def problems(self, at: str) -> Iterable[Problem]:
        """What is wrong with the values."""
        if not 1 <= self.num_bits <= 16:
            yield Problem(f"{at}.num_bits", f"{self.num_bits} is out of range", "Give 2 to 8.")
        if self.type == "float" and self.num_bits not in (4, 6, 8):
            yield Problem(f"{at}.num_bits", f"there is no float of {self.num_bits} bits", "Give 4, 6 or 8.")
        grouped = self.scope in ("group", "tensor_group")
        if grouped and not (self.group_size or 0) > 0:
            what = f"{self.group_size!r} is no group, and the strategy is {self.scope!r}"
            yield Problem(f"{at}.group_size", what, "Give a positive number, such as 128.")
        elif not grouped and self.group_size not in (None, -1):
            what = f"{self.group_size!r} contradicts the strategy {self.scope!r}"
            yield Problem(f"{at}.group_size", what, "Remove it, or use the strategy 'group'.")
        if self.block_structure is not None and min(self.block or (0, 0)) <= 0:
            yield Problem(f"{at}.block_structure", f"{self.block_structure!r} is no tile", "Write it as [128, 128].")
        elif (self.block_structure is not None) != (self.scope == "block"):
            what = f"{self.block_structure!r} contradicts the strategy {self.scope!r}"
            yield Problem(f"{at}.block_structure", what, "Give it with the strategy 'block', and only there.")

    @property
    def group(self) -> Group:
        """The weights that share a scale, in the words of all methods."""
        if self.scope in ("group", "tensor_group"):
            return self.group_size
        if self.scope == "block":
            return self.block
        return "tensor" if self.scope == "tensor" else "row"

    @property
    def element(self) -> str:
        """What a code stands for, in the words of all methods."""
        if self.type == "float":
            return {4: "float4_e2m1fn", 6: "float6_e2m3fn", 8: "float8_e4m3fn"}[self.num_bits]
        return f"{'' if self.symmetric else 'u'}int{self.num_bits}"


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationGroup:
    """Some modules and how they are quantized."""

    targets: tuple[str, ...]
    """Module classes (`Linear`), exact names, or regular expressions after `re:`."""
    weights: QuantizationArgs | None = None
    input_activations: QuantizationArgs | None = None
    output_activations: QuantizationArgs | None = None
    format: Format | None = None
    """How the weights lie in files; None = as the whole configuration says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _RawGroup:
    targets: tuple[str, ...]
    weights: Mapping[str, Any] | None = None
    input_activations: Mapping[str, Any] | None = None
    output_activations: Mapping[str, Any] | None = None
    format: Format | None = None


_TENSORS = ("weights", "input_activations", "output_activations")


def read_args(given: Any, at: str, problems: Problems) -> QuantizationArgs | None:
    """Arguments of one tensor; None where there are none or something is wrong."""
    if given is None:
        return None
    low = {key: value.lower() if key in ("type", "strategy") and isinstance(value, str) else value
           for key, value in given.items()} if isinstance(given, Mapping) else given  # fmt: skip
    args = read_record(QuantizationArgs, low, at, problems)
    if args is not None:
        problems.extend(args.problems(at))
    return args


def read_group(given: Any, at: str, problems: Problems) -> QuantizationGroup | None:
    """One of `config_groups`; None where something is wrong."""
    if isinstance(given, tuple):
        what = "is a preset's name, with a list of targets"
        problems.add(at, what, "Write the group out: an object with targets, weights and input_activations.")
        return None
    raw = read_record(_RawGroup, given, at, problems)
    if raw is None:
        return None
    tensors = {name: read_args(getattr(raw, name), f"{at}.{name}", problems) for name in _TENSORS}
    return QuantizationGroup(targets=raw.targets, format=raw.format, **tensors)


def _essence(group: QuantizationGroup, file_format: Format) -> QuantizationGroup:
    """A group without what only tells how it was calibrated, and with what follows from the rest."""

    def settle(args: QuantizationArgs | None) -> QuantizationArgs | None:
        if args is None:
            return None
        return replace(
            args,
            strategy=cast("Strategy", args.scope),
            group_size=args.group_size if args.scope in ("group", "tensor_group") else None,
            block_structure=args.block,
            actorder=args.actorder if args.actorder in ("group", "dynamic") else None,
            observer=None,
            observer_kwargs=None,
            zp_dtype=None,
        )

    return QuantizationGroup(
        targets=tuple(sorted(group.targets)),
        weights=settle(group.weights),
        input_activations=settle(group.input_activations),
        output_activations=settle(group.output_activations),
        format=group.format or file_format,
    )


def matches(target: str, name: str, class_name: str = "Linear") -> bool:
    """Whether a target or an entry of `ignore` names this module (`compressed_tensors/utils/match.py`)."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target in (name, class_name)


def _group(weights: Mapping[str, Any], file_format: str, inputs: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The fields of a configuration with one group, for all linear modules."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "config_groups": {"group_0": {**group, "format": file_format}},
        "format": file_format,
        "quantization_status": "compressed",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedTensorsConfig(QuantizationConfig):
    """Several precisions in one checkpoint (the format of vLLM and llm-compressor).

    The short name `fp8-row` (a scale for each output row) stands here because its words fit: `strategy="channel"`;
    `fp8` of Hugging Face knows tiles and the whole tensor only.
    """

    quant_method: ClassVar[str] = "compressed-tensors"
    loading_attributes: ClassVar[frozenset[str]] = frozenset({"dequantize", "use_optimized_inference"})
    unwritten: ClassVar[frozenset[str]] = EXTRAS | {"use_optimized_inference"}
    sparse: ClassVar[frozenset[str]] = frozenset({"sparsity_config", "transform_config", "moe_sparsity_config"})
    record_keys: ClassVar[frozenset[str]] = frozenset({"version"})
    history: ClassVar[frozenset[str]] = frozenset(
        {"recorded", "global_compression_ratio", "quantization_status", "format"}  # groups say their format themselves
    )
    skip_field: ClassVar[str | None] = "ignore"
    short_names: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "int4": _group(
            {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}, "pack-quantized"
        ),
        "fp8-row": _group(
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
            "float-quantized",
            {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
        ),
    }

    config_groups: Mapping[str, Any] | None = None
    """Name -> a group; `groups` gives them typed."""
    format: Format = "dense"
    """How weights lie in files, for groups that do not say."""
    quantization_status: Literal[
        "initialized", "calibration", "frozen", "compressed", "decompressed"
    ] = "initialized"  # fmt: skip
    """How far the checkpoint's quantization has come."""
    kv_cache_scheme: Mapping[str, Any] | None = None
    """Arguments of the cache's quantization."""
    global_compression_ratio: float | None = None
    """What the tool measured."""
    ignore: tuple[str, ...] | None = None
    """Classes, exact names, or regular expressions after `re:`, left out; None leaves the choice to the model."""
    use_optimized_inference: bool = False
    """Multiply quantized weights as they are where there is a kernel. Touches no stored bit."""
    sparsity_config: Mapping[str, Any] | None = None
    """Sparsity of the stored weights (older files)."""
    transform_config: Mapping[str, Any] | None = None
    """Rotations applied to weights and activations."""
    moe_sparsity_config: Mapping[str, Any] | None = None
    """Experts pruned."""

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

    def problems(self) -> list[Problem]:
        """Everything wrong with the values; entries of `ignore` are told as they were given."""
        problems = Problems()
        for name, group in (self.config_groups or {}).items():
            read_group(group, where(f"config_groups.{name}"), problems)
        read_args(self.kv_cache_scheme, where("kv_cache_scheme"), problems)
        problems.extend(ModuleSelection(include=self.include_modules, layers=self.layers).problems())
        for pattern in self.ignore or ():
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                what = f"{pattern!r} is no regular expression ({error})"
                problems.add(where("ignore"), what, "Give a module's name, or escape what is meant literally.")
        return list(problems)

    def meaning(self, name: str) -> Any:
        """Groups are compared by what they do to modules: not by their names, nor by how ranges were observed."""
        if name != "config_groups":
            return QuantizationConfig.meaning(self, name)
        return frozenset(_essence(group, self.format) for group in self.groups.values())

    @property
    def groups(self) -> Mapping[str, QuantizationGroup]:
        """`config_groups`, typed, in order."""
        problems = Problems()
        read = {name: read_group(group, name, problems) for name, group in (self.config_groups or {}).items()}
        return {name: group for name, group in read.items() if group is not None}

    def group_of(self, name: str, class_name: str = "Linear") -> QuantizationGroup | None:
        """The group of a module, or None where it is not quantized; a more specific target wins over a class."""
        if any(matches(pattern, name, class_name) for pattern in self.ignore or ()):
            return None
        found = [
            (target == class_name, target.startswith("re:"), place)
            for place, group in enumerate(self.groups.values())
            for target in group.targets
            if matches(target, name, class_name)
        ]
        return list(self.groups.values())[min(found)[2]] if found else None

    @property
    def selection(self) -> ModuleSelection:
        """Which modules this converts; `ignore` in the words of `ModuleSelection`."""
        skip = None if self.ignore is None else tuple(map(_as_pattern, self.ignore))
        return ModuleSelection(skip=skip, include=self.include_modules, layers=self.layers)

    def vocabulary(self) -> tuple[Precision, ...]:
        found = []
        for group in self.groups.values():
            weights, inputs = group.weights, group.input_activations
            if weights is None:
                continue
            packed = (group.format or self.format).endswith("pack-quantized") and weights.type == "int"
            found.append(
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
        return tuple(found)


def _as_pattern(entry: str) -> str:
    """An entry of `ignore` as `ModuleSelection` reads it: the whole name, or any name that a pattern begins."""
    return f"(?:{entry[3:]}).*" if entry.startswith("re:") else f"{re.escape(entry)}$"
