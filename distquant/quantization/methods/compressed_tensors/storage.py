"""The way in which one group of a compressed-tensors configuration stores weights, and the group of a module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from distquant.config import CompressedTensorsConfig, QuantizationArgs, QuantizationGroup
from distquant.config.quantization_group import matches
from distquant.errors import Problem
from distquant.model.module_names import matches_any
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
"""Formats that are supported."""
WORD = 32
"""Bits of a word of packed codes."""
REORDERED = ("group", "dynamic", True)
"""Values of `actorder` under which columns belong to groups in another order than their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """One group's way of storing a weight `[out, in]`.

    By `compressors/pack_quantized` and `compressors/naive_quantized` of compressed-tensors 0.20. Codes are `weight`
    (int8 or float8_e4m3fn `[out, in]`) or, packed, `weight_packed` (int32 `[out, ceil(in * bits / 32)]`: a stream of
    `code + 2^(bits - 1)`, the lowest bits first). `weight_scale` has the strategy's shape: `[1]`, `[out, 1]`,
    `[out, in / group_size]` or tiles. `weight_zero_point` is int8 of that shape, or packed along `out` as the codes
    are along `in` where these are packed and the strategy is channel or group.
    """

    format: str
    weights: QuantizationArgs
    inputs: QuantizationArgs | None = None
    outputs: QuantizationArgs | None = None

    @property
    def packed(self) -> bool:
        return self.format == "pack-quantized"

    @property
    def floating(self) -> bool:
        return self.weights.type == "float"

    @property
    def codes(self) -> str:
        """Component that holds the codes."""
        return "weight_packed" if self.packed else ""

    @property
    def dtype(self) -> str:
        """torch's name of the stored codes' dtype."""
        return "int32" if self.packed else "float8_e4m3fn" if self.floating else "int8"

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that share a scale; `ALL` for a whole dim."""
        scope, args = self.weights.scope, self.weights
        if scope == "tensor":
            return ALL, ALL
        if scope == "block":
            return args.block or (ALL, ALL)
        return 1, (args.group_size or ALL) if scope == "group" else ALL

    @property
    def packed_zero(self) -> bool:
        """True if zero points are packed, too."""
        return self.packed and self.weights.scope in ("channel", "group")

    @property
    def by_rows_in_float8(self) -> bool:
        """True if weights are float8 with a scale for each row or for all, and inputs are meant to be float8."""
        inputs = self.inputs is not None and self.inputs.type == "float" and self.inputs.num_bits == 8
        return self.floating and self.weights.scope in ("tensor", "channel") and inputs

    @property
    def statics(self) -> tuple[str, ...]:
        """Components of one element that belong to activations whose range is fixed."""
        names = []
        for side, args in (("input", self.inputs), ("output", self.outputs)):
            if args is not None and not args.dynamic:
                names += [f"{side}_scale"] + ([] if args.symmetric else [f"{side}_zero_point"])
        return tuple(names)

    def in_words(self, name: str, dim: int, other: int) -> Component:
        """A component packed into words along `dim`, with one element for `other` of the other dim."""
        bits = self.weights.num_bits
        per, words = (WORD // bits, 1) if WORD % bits == 0 else (WORD, bits)
        block_shape, stored = ((other, per), (1, words)) if dim == 1 else ((per, other), (words, 1))
        steps = (PLAIN_STEPS[0], per, 1) if per <= PLAIN_STEPS[0] else (per, 1)
        return Component(
            name=name,
            dtype="int32",
            block_shape=block_shape,
            stored_per_block=stored,
            preferred_alignments=steps if dim == 1 else (),
        )

    def components(self, dtype: str) -> tuple[Component, ...]:
        """Components of a weight that was quantized from `dtype`, except its shape."""
        codes = Component(name="", dtype=self.dtype, preferred_alignments=PLAIN_STEPS)
        components = [self.in_words(self.codes, 1, 1) if self.packed else codes]
        components.append(Component(name="weight_scale", dtype=dtype, block_shape=self.tile))
        if not self.weights.symmetric:
            zero = Component(name="weight_zero_point", dtype="int8", block_shape=self.tile)
            components.append(self.in_words(zero.name, 0, self.tile[1]) if self.packed_zero else zero)
        for name in self.statics:
            components.append(Component(name=name, dtype="int8" if "zero" in name else dtype, block_shape=(ALL, ALL)))
        return tuple(components)

    def problems(self, field: str, prequantized: bool) -> Iterator[Problem]:
        """Yields what of it is not supported."""
        args, original = self.weights, "Quantize the original in one of the supported ways, or take another checkpoint"
        if self.format not in FORMATS:
            yield Problem(f"{field}.format", f"{self.format!r} is not supported", f"Supported are {', '.join(FORMATS)}")
            return
        if args.scope not in ("tensor", "channel", "group", "block"):
            yield Problem(f"{field}.weights.strategy", f"{args.scope!r} is not supported for weights", original)
        if self.floating and (args.num_bits != 8 or not args.symmetric or self.packed):
            sign = "symmetric" if args.symmetric else "asymmetric"
            fault = f"{sign} floats of {args.num_bits} bits as {self.format!r}: only symmetric FP8, not packed"
            yield Problem(f"{field}.weights", fault, original)
        if not self.floating and args.num_bits > 8:
            yield Problem(f"{field}.weights.num_bits", f"{args.num_bits} bits, integers have at most 8 here", original)
        if args.actorder in REORDERED:
            fault = f"{args.actorder!r} gives each column a group of its own choice (g_idx), which is not supported"
            yield Problem(
                f"{field}.weights.actorder", fault, "Quantize the original again with actorder='weight' or none"
            )
        if not prequantized:
            yield from self._not_quantizable(field)

    def _not_quantizable(self, field: str) -> Iterator[Problem]:
        """Yields what needs more than the weights, or kernels that do not exist."""
        args = self.weights
        if not self.floating and args.num_bits not in (4, 8):
            fault = f"{args.num_bits} bits: weights are quantized to 4 or 8 bits while they are loaded"
            yield Problem(f"{field}.weights.num_bits", fault, "Give 4 or 8, or load a quantized checkpoint")
        if args.scale_dtype is not None:
            fault = f"{args.scale_dtype!r}: scales are stored in the weight's own dtype"
            yield Problem(f"{field}.weights.scale_dtype", fault, "Leave it out")
        if not args.symmetric and args.zp_dtype not in (None, "torch.int8", "int8"):
            yield Problem(f"{field}.weights.zp_dtype", f"{args.zp_dtype!r}: zero points are int8", "Leave it out")
        if self.statics:
            fault = "activations have a fixed range, which needs calibration"
            yield Problem(f"{field}.input_activations", fault, "Set dynamic=true, or leave activations unquantized")


def storages(config: CompressedTensorsConfig) -> dict[str, Storage]:
    """The storage of each group that quantizes weights, by its name in the configuration."""
    return {
        name: Storage(
            format=_format(config.format, group),
            weights=group.weights,
            inputs=group.input_activations,
            outputs=group.output_activations,
        )
        for name, group in config.groups.items()
        if group.weights is not None
    }


def _format(default: str, group: QuantizationGroup) -> str:
    """The group's own format, the file's default, or the one that its precision means (`compressors/format.py`)."""
    if group.format is not None:
        return group.format
    weights, inputs = group.weights, group.input_activations
    if default not in ("mixed-precision", "dense", "fakequant") or weights is None:
        return default
    if weights.type == "int" and inputs is not None and inputs.type == "int":
        return "int-quantized"
    if weights.type == "int":
        return "pack-quantized" if weights.num_bits <= 8 and inputs is None else "naive-quantized"
    return "float-quantized" if inputs is not None else "naive-quantized"


def target_of(names: Sequence[str], targets: Mapping[str, str]) -> str | None:
    """The group of a linear module with these names, from target -> group.

    Matches have the order of `match_targets` (`utils/match.py`): exact names, then patterns, then classes, each in the
    order of the alphabet.
    """
    matching = (target for target in targets if matches_any(target, names, matches))
    ranked = [(target == "Linear", target.startswith("re:"), target) for target in matching]
    return targets[min(ranked)[2]] if ranked else None
