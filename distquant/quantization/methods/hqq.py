"""HQQ: groups of 8 to 1 bits with a float scale and zero point, improved by an iteration over the whole weight.

Every round moves the zero points, and the rounds end when the mean error of the *whole* weight no longer falls. So one
rank quantizes the whole weight, in float32, on the device that it is loaded to. On a CPU it has the bits that hqq gives
where torch has one thread (on two or three it gives a few other codes for 2048 x 2000 weights): see `hqq_optimizer.py`.

Packed codes have no contiguous slice: `BitPack` (`hqq/core/bitpack.py`) puts the first part of the grouped rows into
the high bits and the last into the low ones. Codes are therefore passed on unpacked, a byte each, and packed again as
the weight of its own size that a shard is; a stored `W_q` is replicated on every rank, which keeps its part.

Groups along the rows (axis 1) may straddle rows, and groups that stride the rows (axis 0) may not divide them. Both are
split into groups of the largest size that fits, with the same scale and zero: no value changes. With axis 0 the row
`r` shares its groups with every row `r + i * period`, so a partition falls between whole periods, and every rank needs
the scales of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import HqqConfig, torch_dtype
from distquant.config.hqq import HqqWeight
from distquant.dtypes import DTYPE_BYTES
from distquant.errors import InputError, Problem
from distquant.kernels.protocol import Kernels
from distquant.model.description import Linear, ModelDescription
from distquant.quantization.algorithms.hqq_constants import CONSTANTS, meant, size_problems, value_problems
from distquant.quantization.algorithms.hqq_groups import PER_WORD, Groups, sliced
from distquant.quantization.algorithms.hqq_optimizer import quantize_hqq
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.quantized_scheme import QuantizedScheme
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context
from distquant.quantization.stored_checks import OTHER_CHECKPOINT, SCALE_DTYPES, lacks, wrong_dtypes
from distquant.quantization.stored_values import FINITE, Check
from distquant.quantization.weight_only import mark_quantized
from distquant.sharding.layout import ALL, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

WORKING, WORKING_ROUNDED = 10, 6
"""Bytes of working memory that `quantize_hqq` takes for each element, with the iteration and without.

Measured: 9.1 and 5.4, peak resident memory of a process that quantizes a bfloat16 weight of 8M elements on two threads.
"""


@register
class HqqScheme(QuantizedScheme, Encoder):
    """`HQQLinear` of local size, with the backend that is set in hqq (its own default is plain PyTorch).

    Encoded components: "" (codes, uint8 `[out, in]`), `scales` and `zeros` (one for each fine group: with axis 1 in the
    weight's dtype `[out, in / group]`, with axis 0 in float32 `[period, in]`, replicated on every rank). The stored
    ones (`W_q`, `scale`, `zero`) have other names, because none of them is sliced as it is stored.
    """

    name = "hqq"
    config_class = HqqConfig
    requires: ClassVar[Mapping[str, str]] = {"hqq": "0.2.8"}
    unmoved: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cpu", "disk"), "hooks move no scales and zero points that are in `HQQLinear`'s own metadata"
    )
    stacks: ClassVar[bool] = False  # its kernels read packed codes by the metadata of an `HQQLinear`
    suffixes: ClassVar[Mapping[str, str]] = {key: key for key in ("W_q", "scale", "zero", *CONSTANTS)}
    unsliced: ClassVar[frozenset[str]] = frozenset(("W_q", "scale", "zero"))
    value_checks: ClassVar[Mapping[str, Check]] = {"scale": FINITE, "zero": FINITE}
    constants: ClassVar[frozenset[str]] = frozenset(CONSTANTS)
    config: HqqConfig

    def weight(self, name: str) -> HqqWeight:
        """The fields of the parameter of this name."""
        if self.config.dynamic_config is None:
            return self.config.weight
        module = name.removesuffix(".weight")
        return self.config.dynamic[self._tag(module) or linear_tag(module)]

    def _tag(self, module: str) -> str | None:
        """The key of a module in `dynamic_config`, by one of its names; None where it has none."""
        tags = map(linear_tag, self.names.of(module))
        return next((tag for tag in tags if tag in (self.config.dynamic_config or {})), None)

    def can_be_stored(self, linear: Linear) -> bool:
        return self.config.dynamic_config is None or self._tag(linear.name) is not None

    def groups(self, name: str, shape: tuple[int, ...]) -> Groups:
        """The groups of a whole weight."""
        return Groups.of(self.weight(name), shape)

    # -- layout rules ----------------------------------------------------------------------------------------------

    def validate(self, context: Context) -> list[Problem]:
        problems = super().validate(context)
        if any(weight.view_as_float for weight in (self.config.weight, *self.config.dynamic.values())):
            fault = "True shows packed codes as floats, which is not supported"
            problems.append(Problem("quantization_config.view_as_float", fault, "Set it to False"))
        return problems

    def select_modules(self, description: ModelDescription) -> list[str]:
        chosen = super().select_modules(description)
        if self.config.dynamic_config is None:
            return chosen
        return [name for name in chosen if self._tag(name)]

    def check_weight(self, name: str, shape: tuple[int, ...]) -> list[Problem]:
        groups = self.groups(name, shape)
        fix = "Skip the module (skip_modules), or choose another group_size or number of bits"
        if math.prod(shape) % groups.size:
            fault = f"its {math.prod(shape)} elements are not a multiple of group_size {groups.size}"
            return [Problem(name, fault, fix)]
        if shape[0] % groups.row_alignment:
            per, rows = PER_WORD[groups.bits], f"{shape[0]} rows"
            fault = (
                f"{per} codes of {groups.bits} bits share a byte, which its {rows} in groups of {groups.fine} do not"
            )
            return [Problem(name, fault + " fill", fix)]
        return []

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        problems = self.check_weight(name, shape)
        if problems:
            return problems
        groups = self.groups(name, shape)
        count = math.prod(shape) // groups.size
        expected = {"W_q": math.prod(groups.packed_shape(groups.stored_groups())), "scale": count, "zero": count}
        missing = [component for component in expected if component not in stored]
        problems += [lacks(name, ", ".join(missing))] if missing else []
        for component, elements in expected.items():
            if component in stored and math.prod(stored[component]) != elements:
                shown = list(stored[component])
                fault = f"{component} is stored as {shown}, its config and shape need {elements} values"
                problems.append(Problem(name, fault, OTHER_CHECKPOINT))
        problems += size_problems(name, meant(groups, shape), stored)
        return problems

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        words = ("I32",) if self.weight(name).nbits == 3 else ("U8",)
        floats = {"scale": SCALE_DTYPES, "zero": SCALE_DTYPES}
        return wrong_dtypes(name, dtypes, {"W_q": words, **floats, "shape": ("I64", "I32")})

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        groups = self.groups(name, shape)
        alignment = groups.row_alignment
        if groups.axis == 1:
            codes = Component(name="", dtype="uint8", preferred_alignments=(16, alignment))
        else:
            codes = Component(name="", dtype="uint8", block_shape=(alignment, 1), stored_per_block=(alignment, 1))
        return Layout((codes, *_statistics(groups, dtype)))

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        return (Component(name="", dtype="uint8"), *_statistics(self.groups(name, shape), dtype))

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

    # -- codec -----------------------------------------------------------------------------------------------------

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        weight, groups, target = self.weight(name), self.groups(name, tuple(rows.shape)), out[""]
        scale, zero = quantize_hqq(
            rows, weight.nbits, groups.size, weight.axis, weight.optimize, weight.rounds_zero, target
        )
        out["scales"].copy_(groups.repeated(scale))
        out["zeros"].copy_(groups.repeated(zero))

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        groups, scale, zero = self.groups(shard.name, shard.shape), parts["scales"], parts["zeros"]
        if groups.axis == 0:
            scale, zero = groups.local_values(scale, shard), groups.local_values(zero, shard)
        return self._packed(shard, parts[""].view(shard.local_shape), scale, zero)

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        groups = self.groups(shard.name, shard.shape)
        problems = list(value_problems(shard.name, meant(groups, shard.shape), parts))
        if problems:
            raise InputError(problems)
        grouped = groups.stored_groups()
        codes = groups.unpack(parts["W_q"].view(groups.packed_shape(grouped)), grouped).view(shard.shape)
        scale, zero = (groups.local_values(groups.repeated(parts[name]), shard) for name in ("scale", "zero"))
        return self._packed(shard, sliced(codes, shard.columns, shard.rows), scale, zero)

    def _packed(self, shard: Shard, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Stored components of unpacked codes `[out, in]` and one scale and zero for each fine group."""
        groups, dtype = self.groups(shard.name, shard.shape), torch_dtype(shard.dtype)
        beside = (-1, 1) if groups.axis == 1 else (1, -1)
        scale, zero = (values.reshape(beside).to(dtype).contiguous() for values in (scale, zero))
        return {"W_q": groups.pack(codes, shard.local_shape), "scale": scale, "zero": zero}

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        from hqq.core.quantize import Quantizer

        weight: Tensor = Quantizer.dequantize(components["W_q"], self._metadata(shard, components))
        return weight.to(dtype)

    def _metadata(self, shard: Shard, components: Mapping[str, Tensor]) -> dict[str, Any]:
        groups = self.groups(shard.name, shard.shape)
        return groups.metadata(shard.local_shape, components, torch_dtype(shard.dtype))

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        groups, (rows, columns) = self.groups(shard.name, shard.shape), shard.local_shape
        codes = groups.unpack(components["W_q"], groups.grouped(shard.local_shape))
        yield "code", codes.view(rows, columns), 1
        for name in ("scale", "zero"):
            values = components[name]
            if groups.axis == 1:
                yield name, values.view(rows, -1), WHOLE_ROW if groups.width == ALL else groups.fine
            else:
                yield name, values.view(groups.period, columns).repeat(rows // groups.period, 1), 1

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        from hqq.core.quantize import HQQLinear

        groups, params = self.groups(shard.name, shard.shape), self.weight(shard.name).as_params()
        grouped = groups.grouped(shard.local_shape)
        local = {**params["weight_quant_params"], "group_size": grouped[groups.axis]}
        params = {**params, "weight_quant_params": local}
        dtype = torch_dtype(shard.dtype)
        module: Any = HQQLinear(None, params, compute_dtype=dtype, device="meta", initialize=False)
        del module.bias  # a plain attribute where there is none; ours is always a parameter's place
        module.register_parameter("bias", linear.bias)
        module.out_features, module.in_features = shard.local_shape
        word = torch.int32 if groups.bits == 3 else torch.uint8
        empty = torch.empty(groups.packed_shape(grouped), dtype=word, device="meta")
        module.W_q = nn.Parameter(empty, requires_grad=False)
        return module

    def fill(self, shard: Shard, module: Any, components: Mapping[str, Tensor]) -> None:
        words = components["W_q"]
        module.W_q = nn.Parameter(words, requires_grad=False)
        module.meta = self._metadata(shard, components)
        module.device, module.ready = words.device, True
        module.in_gpu = words.device.type != "cpu"

    def components(self, module: Any) -> dict[str, Tensor]:
        return {"W_q": module.W_q.data, "scale": module.meta["scale"], "zero": module.meta["zero"]}

    def unsaved(self, model: nn.Module) -> str | None:
        return "transformers does not read weights that hqq has quantized, and would draw others"

    def finish_model(self, model: Any) -> None:
        mark_quantized(model, self)


def linear_tag(name: str) -> str:
    """The name of a module in `dynamic_config` (`name_to_linear_tag`, transformers 5.23 `integrations/hqq.py`)."""
    return ".".join(part for part in name.split(".") if part not in ("model", "layers") and not part.isnumeric())


def _statistics(groups: Groups, dtype: str) -> tuple[Component, ...]:
    """Components of scales and zeros; those that stride the rows (axis 0) belong to every row of a period."""
    if groups.axis == 1:
        return tuple(Component(name=name, dtype=dtype, block_shape=(1, groups.width)) for name in ("scales", "zeros"))
    return tuple(
        Component(name=name, dtype="float32", flat=groups.fine, replicated=True) for name in ("scales", "zeros")
    )
