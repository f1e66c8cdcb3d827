"""Groups of compressed-tensors: some modules, and the precision of their weights and activations.

The fields are those of `QuantizationScheme` and `QuantizationArgs` (`compressed_tensors/quantization/` 0.20).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from distquant.config.evidence import without_unknown
from distquant.config.records import read_record
from distquant.config.vocabulary import Group
from distquant.errors import Problem, Problems
from distquant.patterns import compiled, pattern_error, shortened

Format = Literal[
    "dense", "fakequant", "sparse-bitmask", "sparse-24-bitmask", "int-quantized", "float-quantized", "naive-quantized",
    "pack-quantized", "marlin-24", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mxfp6-pack-quantized", "mxfp8-quantized",
]  # fmt: skip
"""The file format of a group's weights."""

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationArgs:
    """The quantization of one tensor of a group."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    """Elements of a group; -1 or None with a strategy without groups."""
    strategy: Strategy | None = None
    """The elements that share a scale; None follows from `group_size`, see `scope`."""
    block_structure: tuple[int, int] | str | None = None
    """The tile of the strategy `block`."""
    dynamic: bool | Literal["local"] = False
    """True if scales are computed at run time; `local` if only those of groups are, not the tensor's."""
    actorder: bool | Literal["group", "weight", "static", "dynamic"] | None = None
    """The order in which columns were quantized, by activation size; `group` (older files) permutes the groups."""
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
            tile = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", self.block_structure)
            return (int(tile[1]), int(tile[2])) if tile else None
        return self.block_structure

    def problems(self, path: str) -> Iterable[Problem]:
        """Yields the problems of the values."""
        if not 1 <= self.num_bits <= 16:
            yield Problem(f"{path}.num_bits", f"{self.num_bits} is out of range", "Give 2 to 8.")
        if self.type == "float" and self.num_bits not in (4, 6, 8):
            yield Problem(f"{path}.num_bits", f"invalid float of {self.num_bits} bits", "Give 4, 6 or 8.")
        grouped = self.scope in ("group", "tensor_group")
        if grouped and not (self.group_size or 0) > 0:
            reason = f"invalid group size {self.group_size!r} for the strategy {self.scope!r}"
            yield Problem(f"{path}.group_size", reason, "Give a positive number, such as 128.")
        elif not grouped and self.group_size not in (None, -1):
            reason = f"{self.group_size!r} contradicts the strategy {self.scope!r}"
            yield Problem(f"{path}.group_size", reason, "Remove it, or use the strategy 'group'.")
        if self.block_structure is not None and min(self.block or (0, 0)) <= 0:
            yield Problem(
                f"{path}.block_structure", f"invalid tile {self.block_structure!r}", "Write it as [128, 128]."
            )
        elif (self.block_structure is not None) != (self.scope == "block"):
            reason = f"{self.block_structure!r} contradicts the strategy {self.scope!r}"
            yield Problem(f"{path}.block_structure", reason, "Give it with the strategy 'block', and only there.")

    @property
    def group(self) -> Group:
        """The weights that share a scale, in terms of all methods."""
        if self.scope in ("group", "tensor_group"):
            return self.group_size
        if self.scope == "block":
            return self.block
        return "tensor" if self.scope == "tensor" else "row"

    @property
    def element(self) -> str:
        """The type of a code, in terms of all methods."""
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
    """The file format of the weights; None = the configuration's format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _RawGroup:
    targets: tuple[str, ...]
    weights: Mapping[str, Any] | None = None
    input_activations: Mapping[str, Any] | None = None
    output_activations: Mapping[str, Any] | None = None
    format: Format | None = None


_TENSORS = ("weights", "input_activations", "output_activations")


def known_of_args(given: Any, path: str, unknown: dict[str, Any]) -> Any:
    """Returns stored arguments of one tensor without unknown keys; moves these to `unknown`, under dotted paths."""
    return without_unknown(given, (field.name for field in fields(QuantizationArgs)), path, unknown)


def known_of_group(given: Any, path: str, unknown: dict[str, Any]) -> Any:
    """Returns one of a stored `config_groups` without unknown keys, likewise."""
    group = without_unknown(given, (field.name for field in fields(_RawGroup)), path, unknown)
    if not isinstance(group, Mapping):
        return group
    return {
        key: known_of_args(value, f"{path}.{key}", unknown) if key in _TENSORS else value
        for key, value in group.items()
    }


def read_args(given: Any, path: str, problems: Problems) -> QuantizationArgs | None:
    """Reads the arguments of one tensor; returns None if there are none, or after adding to `problems`."""
    if given is None:
        return None
    low = {key: value.lower() if key in ("type", "strategy") and isinstance(value, str) else value
           for key, value in given.items()} if isinstance(given, Mapping) else given  # fmt: skip
    args = read_record(QuantizationArgs, low, path, problems)
    if args is not None:
        problems.extend(args.problems(path))
    return args


def read_group(given: Any, path: str, problems: Problems) -> QuantizationGroup | None:
    """Reads one of `config_groups`; returns None after adding to `problems`."""
    if isinstance(given, tuple):
        reason = "is a preset's name, with a list of targets"
        problems.add(path, reason, "Write the group out: an object with targets, weights and input_activations.")
        return None
    raw = read_record(_RawGroup, given, path, problems)
    if raw is None:
        return None
    for target in raw.targets:
        if target.startswith("re:") and (error := pattern_error(target[3:])) is not None:
            reason = f"{shortened(target)} is not a regular expression ({error})"
            problems.add(f"{path}.targets", reason, "Correct the pattern")
    tensors = {name: read_args(getattr(raw, name), f"{path}.{name}", problems) for name in _TENSORS}
    return QuantizationGroup(targets=raw.targets, format=raw.format, **tensors)


def normalized_group(group: QuantizationGroup, file_format: Format) -> QuantizationGroup:
    """Reduces a group to what it does to weights: without traces of calibration, and with all implied fields set."""

    def normalized(args: QuantizationArgs | None) -> QuantizationArgs | None:
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
        weights=normalized(group.weights),
        input_activations=normalized(group.input_activations),
        output_activations=normalized(group.output_activations),
        format=group.format or file_format,
    )


def matches(target: str, name: str, class_name: str = "Linear") -> bool:
    """Returns True if a target or an entry of `ignore` names this module (`compressed_tensors/utils/match.py`)."""
    if target.startswith("re:"):
        return compiled(target[3:]).match(name)
    return target in (name, class_name)
