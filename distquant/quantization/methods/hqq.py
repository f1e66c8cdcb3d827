"""HQQ: groups of 8 to 1 bits with a float scale and zero point, found by an iteration over the whole weight.

Every round moves the zero points, and the rounds end when the mean error of the *whole* weight no longer falls. So one
rank quantizes a weight as one, in float32 on the CPU whatever device it is kept on, with the bits that hqq gives where
torch has one thread (on two or three it gives a few other codes for 2048 x 2000 weights): see `hqq_rounds.py`.

Packed codes have no contiguous slice: `BitPack` (`hqq/core/bitpack.py`) puts the first part of the grouped rows into
the high bits and the last into the low ones. Codes are therefore handed on unpacked, a byte each, and packed again as
the weight of its own size that a shard is; a stored `W_q` goes whole to every rank, which keeps its part.

Groups along the rows (axis 1) that straddle rows, and groups that stride the rows (axis 0) and do not divide them, are
taken apart into groups of the largest size that does, with the same scale and zero: no value changes. With axis 0 the
row `r` shares its groups with every row `r + i * period`, so rows are cut in whole periods, and every rank needs the
scales of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import HqqConfig, torch_dtype
from distquant.config.hqq import HqqWeight
from distquant.dtypes import DTYPE_BYTES
from distquant.errors import InputError, Problem
from distquant.model.description import ModelDescription
from distquant.quantization.algorithms.hqq_optimizer import quantize_hqq
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context, Scheme
from distquant.quantization.weight_only import mark_quantized
from distquant.sharding.layout import ALL, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

if TYPE_CHECKING:
    from distquant.sharding.tally import Tally

PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Codes in a stored integer, by bits."""

WORKING, WORKING_ROUNDED = 10, 6
"""Bytes of working memory that `quantize_hqq` takes for each element, with the iteration and without.

Measured: 9.1 and 5.4, peak resident memory of a process that quantizes a bfloat16 weight of 8M elements on two threads.
"""

FIXED = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
"""What `HQQLinear.state_dict` stores beside codes, scales, zeros and bias: how the weight was quantized."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a weight `[out, in]`.

    Attributes:
        shape: of the weight.
        bits: of a code.
        axis: 1 = along the rows, 0 = striding them.
        size: elements of a group as it is quantized.
        fine: elements of the groups that a shard keeps, a divisor of `size` and of the row (axis 1) or column (0).
    """

    shape: tuple[int, int]
    bits: int
    axis: int
    size: int

    @classmethod
    def of(cls, weight: HqqWeight, shape: tuple[int, ...]) -> Groups:
        out, into = shape
        return cls((out, into), weight.nbits, weight.axis, weight.group_size or (into if weight.axis == 1 else out))

    @property
    def fine(self) -> int:
        return math.gcd(self.size, self.shape[self.axis])

    @property
    def period(self) -> int:
        """Rows after which the groups repeat (axis 0)."""
        return self.shape[0] // self.fine

    @property
    def span(self) -> int:
        """Columns that share a scale (axis 1); `ALL` where it is the row."""
        return ALL if self.fine == self.shape[1] else self.fine

    @property
    def row_unit(self) -> int:
        """Rows at which the weight may be cut: what is packed together stays together."""
        padded = self.bits == 3
        return (self.period if self.axis == 0 else 1) * (1 if padded else PER_WORD[self.bits])

    def repeated(self, values: Tensor) -> Tensor:
        """One value for each fine group, flat, from one for each group."""
        times = self.size // self.fine
        flat = values.reshape(-1)
        return flat.repeat_interleave(times) if self.axis == 1 else flat.repeat(times)

    def grouped(self, local: tuple[int, int]) -> tuple[int, int]:
        """Shape of a local part's codes as hqq groups them; the local group size is that of `axis`."""
        out, into = local
        if self.axis == 0:
            return out // self.period, self.period * into
        size = into if self.span == ALL else self.fine
        return out * into // max(size, 1), size

    def packed_shape(self, grouped: tuple[int, int]) -> tuple[int, int]:
        """Shape of `W_q`."""
        return -(-grouped[0] // PER_WORD[self.bits]), grouped[1]


@register
class HqqScheme(Scheme):
    """`HQQLinear` of local size, with the backend that is set in hqq (its own default is plain PyTorch).

    Components as they flow: "" (codes, uint8 `[out, in]`), `scales` and `zeros` (one for each fine group: with axis 1
    in the weight's dtype `[out, in / group]`, with axis 0 in float32 `[period, in]`, whole on every rank). What is
    stored (`W_q`, `scale`, `zero`) has other names, because nothing of it is cut as it lies.
    """

    name = "hqq"
    config_class = HqqConfig
    requires: ClassVar[Mapping[str, str]] = {"hqq": "0.2.8"}
    unmoved: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cpu", "disk"), "hooks move no scales and zero points that are in `HQQLinear`'s own metadata"
    )
    stacks: ClassVar[bool] = False  # what packed codes mean is in `HQQLinear`'s own metadata
    suffixes: ClassVar[Mapping[str, str]] = {key: key for key in ("W_q", "scale", "zero", *FIXED)}
    unsliced: ClassVar[frozenset[str]] = frozenset(("W_q", "scale", "zero"))
    constants: ClassVar[frozenset[str]] = frozenset(FIXED)
    config: HqqConfig

    # -- deciding --------------------------------------------------------------------------------------------------

    def weight(self, name: str) -> HqqWeight:
        """How the parameter of this name is quantized."""
        if self.config.dynamic_config is None:
            return self.config.weight
        return self.config.dynamic[linear_tag(name.removesuffix(".weight"))]

    def groups(self, name: str, shape: tuple[int, ...]) -> Groups:
        return Groups.of(self.weight(name), shape)

    def validate(self, context: Context) -> list[Problem]:
        found = super().validate(context)
        for weight in (self.config.weight, *self.config.dynamic.values()):
            if weight.view_as_float:
                what = "True shows packed codes as floats, which is not supported"
                found.append(Problem("quantization_config.view_as_float", what, "Set it to False"))
                break
        return found

    def select_modules(self, description: ModelDescription) -> list[str]:
        chosen = super().select_modules(description)
        if self.config.dynamic_config is None:
            return chosen
        return [name for name in chosen if linear_tag(name) in self.config.dynamic_config]

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        groups = self.groups(name, shape)
        fix = "Skip the module (skip_modules), or choose another group_size or number of bits"
        if math.prod(shape) % groups.size:
            what = f"its {math.prod(shape)} elements are no multiple of group_size {groups.size}"
            return [Problem(name, what, fix)]
        if shape[0] % groups.row_unit:
            per, rows = PER_WORD[groups.bits], f"{shape[0]} rows"
            what = f"{per} codes of {groups.bits} bits share a byte, which its {rows} in groups of {groups.fine} do not"
            return [Problem(name, what + " fill", fix)]
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        found = self.check_weight(name, shape)
        if found:
            return found
        groups = self.groups(name, shape)
        count = math.prod(shape) // groups.size
        whole = (count, groups.size) if groups.axis == 1 else (groups.size, count)
        expected = {"W_q": math.prod(groups.packed_shape(whole)), "scale": count, "zero": count}
        for component, elements in expected.items():
            if component not in stored:
                what = f"the checkpoint lacks {component} of this quantized weight"
                found.append(Problem(name, what, "Download the checkpoint again, or quantize the original"))
            elif math.prod(stored[component]) != elements:
                what = (
                    f"{component} is stored as {list(stored[component])}, its config and shape need {elements} values"
                )
                found.append(Problem(name, what, "The checkpoint is of another model or method; check config.json"))
        return found

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        groups = self.groups(name, shape)
        alignment = groups.row_unit
        if groups.axis == 1:
            codes = Component(name="", dtype="uint8", preferred_alignments=(16, alignment))
            return Layout((codes, *self._along(groups, dtype)))
        return Layout(
            (
                Component(name="", dtype="uint8", block_shape=(alignment, 1), stored_per_block=(alignment, 1)),
                *self._striding(groups),
            )
        )

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        groups = self.groups(name, shape)
        pair = self._along(groups, dtype) if groups.axis == 1 else self._striding(groups)
        return (Component(name="", dtype="uint8"), *pair)

    @staticmethod
    def _along(groups: Groups, dtype: str) -> Iterable[Component]:
        return (Component(name=name, dtype=dtype, block_shape=(1, groups.span)) for name in ("scales", "zeros"))

    @staticmethod
    def _striding(groups: Groups) -> Iterable[Component]:
        return (
            Component(name=name, dtype="float32", flat=groups.fine, replicated=True) for name in ("scales", "zeros")
        )

    def replicated_components(self, shard: Shard) -> frozenset[str]:
        return frozenset(("scales", "zeros") if self.groups(shard.name, shard.shape).axis == 0 else ())

    def whole_weight_workspace(self, name: str, shape: tuple[int, int]) -> int:
        weight, groups = self.weight(name), self.groups(name, shape)
        if weight.optimize:
            return WORKING * math.prod(shape)
        return WORKING_ROUNDED * math.prod(shape) if groups.axis == 0 or groups.fine != groups.size else 0

    def shard_nbytes(self, shard: Shard) -> int:
        groups = self.groups(shard.name, shard.shape)
        grouped = groups.grouped(shard.local_shape)
        scales = grouped[1 - groups.axis]
        word = 4 if groups.bits == 3 else 1
        return math.prod(groups.packed_shape(grouped)) * word + 2 * scales * DTYPE_BYTES[shard.dtype]

    # -- executing -------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        from hqq.core.quantize import HQQLinear

        module: Any = HQQLinear(
            None, self._params(shard), compute_dtype=torch_dtype(shard.dtype), device="meta", initialize=False
        )
        del module.bias  # a plain attribute where there is none; ours is always a parameter's place
        module.register_parameter("bias", linear.bias)
        module.out_features, module.in_features = shard.local_shape
        groups = self.groups(shard.name, shard.shape)
        dtype = torch.int32 if groups.bits == 3 else torch.uint8
        empty = torch.empty(groups.packed_shape(groups.grouped(shard.local_shape)), dtype=dtype, device="meta")
        module.W_q = nn.Parameter(empty, requires_grad=False)
        return module

    def _params(self, shard: Shard) -> dict[str, Any]:
        """hqq's configuration of the local module."""
        groups, params = self.groups(shard.name, shard.shape), self.weight(shard.name).as_params()
        size = groups.grouped(shard.local_shape)[groups.axis]
        return {**params, "weight_quant_params": {**params["weight_quant_params"], "group_size": size}}

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Any) -> None:
        weight, groups, target = self.weight(name), self.groups(name, tuple(rows.shape)), out[""]
        codes = target if target.device.type == "cpu" else torch.empty(target.shape, dtype=target.dtype)
        scale, zero = quantize_hqq(
            rows.cpu(), weight.nbits, groups.size, weight.axis, weight.optimize, weight.rounds_zero, codes
        )
        if codes is not target:
            target.copy_(codes)
        out["scales"].copy_(groups.repeated(scale))
        out["zeros"].copy_(groups.repeated(zero))

    def load_encoded(self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], ops: Any) -> None:
        groups = self.groups(shard.name, shard.shape)
        pair = (parts["scales"], parts["zeros"])
        if groups.axis == 0:
            pair = tuple(_kept(p.view(groups.period, -1), shard, (shard.columns,)) for p in pair)  # type: ignore[assignment]
        self._fill(module, shard, parts[""].view(shard.local_shape), *pair)

    def load_prequantized(
        self, shard: Shard, module: nn.Module, parts: dict[str, Tensor], whole: frozenset[str]
    ) -> None:
        from hqq.core.quantize import Quantizer

        groups = self.groups(shard.name, shard.shape)
        self._check_fixed(shard, groups, parts)
        count = math.prod(shard.shape) // groups.size
        grouped = (count, groups.size) if groups.axis == 1 else (groups.size, count)
        packing = Quantizer.bit_to_packing[groups.bits]
        words = parts["W_q"].view(groups.packed_shape(grouped))
        codes = Quantizer.unpack[packing](words, dtype=torch.uint8)[: grouped[0]].view(shard.shape)
        pair = []
        for name in ("scale", "zero"):
            values = groups.repeated(parts[name])
            if groups.axis == 0:
                pair.append(_kept(values.view(groups.period, -1), shard, (shard.columns,)))
            else:
                columns = [(a // groups.fine, -(-b // groups.fine)) for a, b in shard.columns]
                if groups.span == ALL:
                    columns = [(0, 1)]
                pair.append(_kept(values.view(shard.shape[0], -1), shard, (columns, shard.rows)))
        self._fill(module, shard, _kept(codes, shard, (shard.columns, shard.rows)), *pair)

    def _check_fixed(self, shard: Shard, groups: Groups, parts: Mapping[str, Tensor]) -> None:
        """Raises `InputError` where the stored parameters are not those of the configuration."""
        wanted: dict[str, Any] = {
            "nbits": [groups.bits],
            "group_size": [groups.size],
            "axis": [groups.axis],
            "shape": list(shard.shape),
            "view_as_float": [0],
            "quant_scale": [0],
            "quant_zero": [0],
        }
        problems = []
        for name, value in wanted.items():
            found = parts[name].tolist() if name in parts else value
            if found != value:
                what = f"{name} is stored as {found}, the configuration means {value}"
                problems.append(Problem(shard.name, what, "Check that config.json belongs to the checkpoint"))
        if problems:
            raise InputError(problems)

    def _fill(self, module: Any, shard: Shard, codes: Tensor, scale: Tensor, zero: Tensor) -> None:
        """Puts unpacked codes `[out, in]` and one scale and zero for each fine group (flat) into an `HQQLinear`."""
        from hqq.core.quantize import Quantizer

        groups, params = self.groups(shard.name, shard.shape), self._params(shard)["weight_quant_params"]
        grouped = groups.grouped(shard.local_shape)
        packing = Quantizer.bit_to_packing[groups.bits]
        packed = Quantizer.pack[packing](codes.reshape(grouped))
        beside = (-1, 1) if groups.axis == 1 else (1, -1)
        dtype = torch_dtype(shard.dtype)
        module.W_q = nn.Parameter(packed.contiguous(), requires_grad=False)
        module.meta = {
            "nbits": groups.bits,
            "group_size": params["group_size"],
            "shape": torch.Size(shard.local_shape),
            "scale": scale.reshape(beside).to(dtype).contiguous(),
            "zero": zero.reshape(beside).to(dtype).contiguous(),
            "axis": groups.axis,
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
        }
        module.device, module.ready = packed.device, True
        module.in_gpu = packed.device.type == "cuda"

    def dequantized(self, module: Any, shard: Shard, ops: Any) -> Tensor:
        return module.dequantize()

    def unsaved(self, model: nn.Module) -> str | None:
        return "transformers does not read weights that hqq has quantized, and would draw others"

    def finish_model(self, model: Any) -> None:
        mark_quantized(model, self)

    def tally(self, module: Any, shard: Shard, tally: Tally) -> None:
        from hqq.core.quantize import Quantizer

        groups = self.groups(shard.name, shard.shape)
        grouped, (out, into) = groups.grouped(shard.local_shape), shard.local_shape
        codes = Quantizer.unpack[module.meta["packing"]](module.W_q.data, dtype=torch.uint8)[: grouped[0]]
        tally.shard("code", codes.view(out, into), shard.shape, shard.shard_dim, shard.owned)
        for name in ("scale", "zero"):
            values = module.meta[name]
            if groups.axis == 1:
                span = WHOLE_ROW if groups.span == ALL else groups.fine
                values = values.view(out, -1)
            else:
                span, values = 1, values.view(groups.period, into).repeat(out // groups.period, 1)
            tally.shard(name, values, shard.shape, shard.shard_dim, shard.owned, span=span)


def linear_tag(name: str) -> str:
    """What `dynamic_config` calls a module (`name_to_linear_tag`, transformers 5.23 `integrations/hqq.py`)."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _kept(values: Tensor, shard: Shard, segments: tuple[Any, ...]) -> Tensor:
    """Of `[rows, columns]` the segments of the last dim, and then of the first where they are given."""
    for dim, found in zip((1, 0), segments, strict=False):
        values = torch.cat([values.narrow(dim, a, b - a) for a, b in found], dim)
    return values
