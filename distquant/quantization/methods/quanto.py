"""optimum-quanto: rows of int8 or float8 under one scale, groups of 4 or 2 bits under a scale and a shift.

A local module is quanto's `QLinear` with its own tensors of local size, in the form that runs on every device. The
definition is that of quanto 0.2.7 (`nn/qmodule.py`, `tensor/optimizers`, `library/quantize.py`), in the load dtype:
each operation is computed in float32 and rounded to that dtype.

    int8, float8:   scale = max |row| / 127 (448);         code = clamp(round(w / scale))     float8: cast, not rounded
    int4, int2:     scale = (max - min) / 15 (3);          shift = -min
                    code = clamp(round((w + shift) / scale), 0, 15 (3));           weight = code * scale - shift

Groups follow from the inputs of the *whole* weight: the largest of 128, 96, 64 and 32 that divides them, the row where
none does or where it has 128 inputs or fewer. Codes of 4 and 2 bits are stored as matrices of one group a row,
`[out * in / group, group]`, with the first half in the low bits and the second half in the high bits of the bytes
(quarters for 2 bits; `tensor/packed.py`, `pack_weights`). No slice of a weight is a slice of that, so such codes are
replicated on every rank, which packs its own again.

Stored is (`QModuleMixin._save_to_state_dict`): `weight._data` (int8 or float8 `[out, in]`) or `weight._data._data`
(uint8), `weight._scale` and `weight._shift` (`[out, 1]`, or one row a group), `input_scale` and `output_scale`, which
are 1 where activations are left alone. `quanto_qmap.json` lists the quantized modules.

Where a scale is 0 (rows of zeros, groups of equal values) upstream's codes are 0/0, which casts leave undefined and
float8 keeps as NaN; here they are zeros. Where bfloat16 groups of 128 have a kernel of 4 bits (`TinyGemm`), quanto
repacks them at once; here it does when the weight is moved, and gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distquant.config import QuantoConfig, torch_dtype
from distquant.dtypes import DTYPE_BYTES, STORED_NAMES
from distquant.errors import Problem
from distquant.kernels.numbers import number_like
from distquant.kernels.protocol import Kernels
from distquant.quantization.codec import Encoder, Stream
from distquant.quantization.registry import register
from distquant.quantization.scheme import Context
from distquant.quantization.stored_checks import SCALE_DTYPES, wrong_dtypes
from distquant.quantization.stored_values import FINITE, MAGNITUDES, Check
from distquant.quantization.weight_only import WeightOnlyScheme
from distquant.sharding.layout import ALL, PLAIN_STEPS, Component, Layout
from distquant.sharding.shard import Shard
from distquant.sharding.tally import WHOLE_ROW

SCALE, SHIFT = "weight._scale", "weight._shift"
OF_ACTIVATIONS = ("input_scale", "output_scale")
FLOAT8_MAX = 448.0
LARGEST_GROUP, SMALLEST_GROUP = 128, 32


def group_of(columns: int) -> int | None:
    """Columns that share a scale in 4 and 2 bits; None = all of a row (`QModuleMixin.__init__`).

    >>> [group_of(columns) for columns in (64, 128, 192, 256, 352, 144)]
    [None, None, 96, 128, 32, None]
    """
    if columns <= LARGEST_GROUP:
        return None
    sizes = range(LARGEST_GROUP, 0, -SMALLEST_GROUP)
    return next((size for size in sizes if columns % size == 0), None)


def pack_parts(codes: Tensor, bits: int) -> Tensor:
    """Packs codes uint8 `[rows, columns]` to `[ceil(rows / n), columns]`: the i-th of n = 8 / bits parts in bits i."""
    per_byte = 8 // bits
    rows = -(-len(codes) // per_byte)
    packed = codes[:rows].clone()
    for part in range(1, per_byte):
        values = codes[part * rows : (part + 1) * rows]
        packed[: len(values)] |= values << bits * part
    return packed


def unpack_parts(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack_parts`."""
    mask = (1 << bits) - 1
    return torch.cat([packed >> bits * part & mask for part in range(8 // bits)])[:rows]


@register
class QuantoScheme(WeightOnlyScheme, Encoder):
    """`QLinear` of local size; the component "" is `weight._data`."""

    name = "quanto"
    config_class = QuantoConfig
    requires: ClassVar[Mapping[str, str]] = {"optimum-quanto": "0.2.7"}
    suffixes: ClassVar[Mapping[str, str]] = {
        "weight._data._data": "",
        "weight._data": "",
        **{name: name for name in (SCALE, SHIFT, *OF_ACTIVATIONS)},
    }
    value_checks: ClassVar[Mapping[str, Check]] = {
        SCALE: MAGNITUDES,
        **dict.fromkeys((SHIFT, *OF_ACTIVATIONS), FINITE),
    }
    of_activations: ClassVar[frozenset[str]] = frozenset(OF_ACTIVATIONS)
    unmoved: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("cpu", "disk"), "accelerate's hooks cannot put quanto's tensors together again"
    )
    config: QuantoConfig

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.config.weights[-1])

    @property
    def grouped(self) -> bool:
        """True if codes are packed, with a scale and a shift for each group."""
        return self.bits < 8

    @property
    def codes_dtype(self) -> str:
        """torch's name of the dtype that holds codes."""
        return {"int8": "int8", "float8": "float8_e4m3fn"}.get(self.config.weights, "uint8")

    def validate(self, context: Context) -> list[Problem]:
        problems = super().validate(context)
        if self.config.activations is not None:
            fault = f"{self.config.activations!r}: scales of activations come from calibration, which is not done here"
            problems.append(Problem("quantization_config.activations", fault, "Leave it out; weights stay quantized"))
        return problems

    # -- layout rules ----------------------------------------------------------------------------------------------

    def layout(self, name: str, shape: tuple[int, ...], dtype: str) -> Layout:
        return Layout(self._components(dtype, group_of(shape[1]) if self.grouped else None))

    def _components(self, dtype: str, group: int | None) -> tuple[Component, ...]:
        block_shape = (1, group or ALL)
        scale = Component(name=SCALE, dtype=dtype, block_shape=block_shape, preferred_alignments=PLAIN_STEPS)
        ones = tuple(Component(name=n, dtype=dtype, block_shape=(ALL, ALL), replicated=True) for n in OF_ACTIVATIONS)
        if not self.grouped:
            return Component(name="", dtype=self.codes_dtype, preferred_alignments=PLAIN_STEPS), scale, *ones
        codes = Component(name="", dtype="uint8", flat=8 // self.bits, replicated=True)
        return (
            codes,
            scale,
            Component(name=SHIFT, dtype=dtype, block_shape=block_shape, preferred_alignments=PLAIN_STEPS),
            *ones,
        )

    def packed_shape(self, shape: tuple[int, ...], group: int | None) -> tuple[int, int]:
        """Shape of the packed codes of a weight (or of a shard)."""
        rows, columns = shape
        width = group or columns
        return -(-(rows * columns // width) // max(8 // self.bits, 1)), width

    def shard_nbytes(self, shard: Shard) -> int:
        group = group_of(shard.shape[1]) if self.grouped else None
        codes, *others = self._components(shard.dtype, group)
        if not self.grouped:
            return sum(component.nbytes(shard.local_shape) for component in (codes, *others))
        rows, width = self.packed_shape(shard.local_shape, group)
        return rows * width * DTYPE_BYTES[codes.dtype] + sum(c.nbytes(shard.local_shape) for c in others)

    def check_stored(self, name: str, shape: tuple[int, ...], stored: dict[str, tuple[int, ...]]) -> list[Problem]:
        expected = self.packed_shape(shape, group_of(shape[1]))
        if self.grouped and "" in stored and math.prod(stored[""]) == math.prod(expected):
            # Whole rows of groups are packed, which can be more bytes than the codes need.
            stored = {**stored, "": self.layout(name, shape, "float32").component("").shape(shape)}
        return super().check_stored(name, shape, stored)

    def check_dtypes(self, name: str, dtypes: dict[str, str]) -> list[Problem]:
        floats = dict.fromkeys((SCALE, SHIFT, *OF_ACTIVATIONS), SCALE_DTYPES)
        return wrong_dtypes(name, dtypes, {"": (STORED_NAMES[self.codes_dtype],), **floats})

    def encoded_components(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[Component, ...]:
        codes = Component(name="", dtype=self.codes_dtype)
        return codes, *(c for c in self.layout(name, shape, dtype).components if c.name in (SCALE, SHIFT))

    # -- codec -----------------------------------------------------------------------------------------------------

    def encode(self, name: str, rows: Tensor, out: dict[str, Tensor], ops: Kernels) -> None:
        rows = rows.reshape(out[SCALE].numel(), -1)
        codes, scales = out[""].view(rows.shape), out[SCALE].view(-1, 1)
        if not self.grouped:
            top = 127.0 if self.config.weights == "int8" else FLOAT8_MAX
            scale = ops.block_amax(rows, (1, None)).to(rows.dtype) / number_like(top, rows)
            scales.copy_(scale)
            ops.encode_scaled_rows(rows, scale.float(), codes.dtype, rounded=True, codes=codes)
            return
        top = 2.0**self.bits - 1
        least = rows.amin(1, keepdim=True)
        scale = (rows.amax(1, keepdim=True) - least) / number_like(top, rows)
        values = (rows - least).div_(scale).round_().clamp_(0.0, top)
        if bool((empty := scale == 0).any()):
            values.masked_fill_(empty, 0)
        codes.view(torch.int8).copy_(values)  # a third of the time that torch takes for uint8
        scales.copy_(scale)
        out[SHIFT].view(-1, 1).copy_(-least)

    def pack(self, shard: Shard, parts: dict[str, Tensor], ops: Kernels) -> dict[str, Tensor]:
        one = torch.ones((), dtype=torch_dtype(shard.dtype), device=parts[""].device)
        return self._stored(shard, parts, parts[""].view(shard.local_shape)) | {n: one.clone() for n in OF_ACTIVATIONS}

    def pack_prequantized(
        self, shard: Shard, parts: dict[str, Tensor], replicated: frozenset[str]
    ) -> dict[str, Tensor]:
        codes, dtype = parts[""], torch_dtype(shard.dtype)
        if self.grouped:
            packed = codes.view(self.packed_shape(shard.shape, group_of(shard.shape[1])))
            rows = shard.shape[0] * shard.shape[1] // packed.shape[1]
            codes = unpack_parts(packed, self.bits, rows).view(shard.shape)
            for dim, segments in enumerate((shard.rows, shard.columns)):
                codes = torch.cat([codes.narrow(dim, a, b - a) for a, b in segments], dim)
        components = self._stored(shard, parts, codes.reshape(shard.local_shape))
        components |= {name: parts[name].view(()) for name in OF_ACTIVATIONS}
        return {name: value if name == "" else value.to(dtype) for name, value in components.items()}

    def _stored(self, shard: Shard, parts: Mapping[str, Tensor], codes: Tensor) -> dict[str, Tensor]:
        """Codes (unpacked, `[local out, local in]`), scale and shift as quanto stores them."""
        if not self.grouped:
            return {"": codes, SCALE: parts[SCALE].view(-1, 1)}
        width = group_of(shard.shape[1]) or shard.local_shape[1]
        packed = pack_parts(codes.reshape(-1, width), self.bits)
        return {"": packed, SCALE: parts[SCALE].view(-1, 1), SHIFT: parts[SHIFT].view(-1, 1)}

    def dequantize(self, shard: Shard, components: Mapping[str, Tensor], dtype: torch.dtype, ops: Kernels) -> Tensor:
        made: Any = self.tensor(shard, components)
        return made.dequantize().to(dtype)

    def fingerprint_streams(self, shard: Shard, components: Mapping[str, Tensor]) -> Iterable[Stream]:
        group, codes = group_of(shard.shape[1]) if self.grouped else None, components[""]
        if self.grouped:
            rows = shard.local_shape[0] * shard.local_shape[1] // (group or shard.local_shape[1])
            codes = unpack_parts(codes, self.bits, rows).view(shard.local_shape)
        yield "code", codes, 1
        for stream, name in (("scale", SCALE), ("shift", SHIFT)):
            if name in components:
                yield stream, components[name].view(shard.local_shape[0], -1), group or WHOLE_ROW

    # -- modules ---------------------------------------------------------------------------------------------------

    def module(self, linear: nn.Module, shard: Shard) -> nn.Module:
        from optimum.quanto import qfloat8, qint2, qint4, qint8

        from distquant.quantization.linear.quanto_linear import ShardLinear

        out_features, in_features = shard.local_shape
        kind = {"int8": qint8, "float8": qfloat8, "int4": qint4, "int2": qint2}[self.config.weights]
        dtype = torch_dtype(shard.dtype)
        module = ShardLinear(in_features, out_features, bias=False, device="meta", dtype=dtype, weights=kind)
        module.weight_group_size = group_of(shard.shape[1]) if self.grouped else None
        module.register_parameter("bias", linear.bias)
        return module

    def fill(self, shard: Shard, module: Any, components: Mapping[str, Tensor]) -> None:
        module.weight = nn.Parameter(self.tensor(shard, components), requires_grad=False)
        for name in OF_ACTIVATIONS:
            module._buffers[name] = components[name]

    def tensor(self, shard: Shard, components: Mapping[str, Tensor]) -> Tensor:
        """quanto's tensor of a shard, in the form that runs on every device."""
        from optimum.quanto import WeightQBitsTensor, WeightQBytesTensor, qfloat8, qint2, qint4, qint8
        from optimum.quanto.tensor.packed import PackedTensor

        size, stride = torch.Size(shard.local_shape), (shard.local_shape[1], 1)
        if not self.grouped:
            kind = qint8 if self.config.weights == "int8" else qfloat8
            return WeightQBytesTensor(kind, 0, size, stride, components[""], components[SCALE], None)
        group = group_of(shard.shape[1])
        width = group or size[1]
        codes = PackedTensor(components[""], self.bits, torch.Size((size.numel() // width, width)), (width, 1))
        kind = qint4 if self.bits == 4 else qint2
        return WeightQBitsTensor(kind, 0, group, size, stride, codes, components[SCALE], components[SHIFT])

    def unsaved(self, model: nn.Module) -> str | None:
        return "transformers does not read weights that quanto has quantized, and would draw others"

    def components(self, module: Any) -> dict[str, Tensor]:
        """Reads a filled module in the form that runs on every device."""
        from optimum.quanto import WeightQBitsTensor

        weight = module.weight
        if not self.grouped:
            return {"": weight._data, SCALE: weight._scale}
        if type(weight) is not WeightQBitsTensor:
            weight = weight.weight_qbits_tensor()
        return {"": weight._data._data, SCALE: weight._scale, SHIFT: weight._shift}
