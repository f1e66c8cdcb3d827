"""Integers in groups of a row's columns: definitions in `distquant.kernels.reference.groups`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import clamped, magnitude, narrowed, rounded, rounded_to, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, by_rows, on, power, words
from distquant.kernels.gpu.rectangles import covering, rectangle
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.groups import check_bits

PER_PROGRAM = 2048
"""Elements that one program takes at once, where groups are not wider: more spill from registers to memory."""


@triton.jit
def _largest_of(x):
    """float32 `[PER]`: the largest of 0 and the values (float32 `[PER, SIZE]`) that are positive; NaN is above all."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x == x, tl.where(x > 0, bits, 0), magnitude(x))
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "groups"])
def _encode(weight, codes, scale, zero, rows, columns, stride, group, groups, eps, SIZE: tl.constexpr,
            PER: tl.constexpr, TOP: tl.constexpr, SYMMETRIC: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """`PER` groups, each padded to `SIZE` columns."""
    index = tl.program_id(0) * PER + tl.arange(0, PER)  # 32 bits: 2^31 groups would be of one weight
    row, within = (index // groups).to(tl.int64)[:, None], tl.arange(0, SIZE)[None, :]
    column = (index % groups)[:, None] * group + within
    inside = (within < group) & (column < columns) & (row < rows)
    x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
    here = index < rows * groups
    if SYMMETRIC:
        largest = tl.max(magnitude(x), axis=1).to(tl.float32, bitcast=True)
        step = rounded_to(tl.div_rn(largest, tl.full((PER,), TOP - 0.5, tl.float32)), KIND)
    else:
        low, high = -_largest_of(-x), _largest_of(x)
        step = rounded_to(high - low, KIND)
        step = rounded_to(tl.div_rn(step, tl.full((PER,), 2.0 * TOP - 1.0, tl.float32)), KIND)
        exact = rounded_to(-TOP - rounded_to(tl.div_rn(low, step), KIND), KIND)
        point = rounded(clamped(exact, -TOP, TOP - 1.0))
        tl.store(zero + index, point.to(tl.int8), mask=here)
    step = tl.where(step == 0, eps, step)
    tl.store(scale + index, narrowed(step, KIND), mask=here)
    scaled = rounded_to(tl.div_rn(x, tl.broadcast_to(step[:, None], (PER, SIZE))), KIND)
    if not SYMMETRIC:
        scaled = rounded_to(scaled + point.to(tl.float32)[:, None], KIND)
    code = rounded(clamped(scaled, -TOP, TOP - 1.0)).to(tl.int8)
    tl.store(codes + row * columns + column, code, mask=inside)


def quantize_groups(
    weight: Tensor,
    group_size: int,
    bits: int,
    symmetric: bool,
    *,
    codes: Tensor | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equal to the reference's."""
    check_bits(bits)
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    source = by_rows(weight)
    packed = prepared(codes, (rows, columns), torch.int8, weight.device)
    scales = prepared(scale, (rows, groups), weight.dtype, weight.device)
    zeros = None if symmetric else prepared(zero, (rows, groups), torch.int8, weight.device)
    size = power(group_size)
    per = max(PER_PROGRAM // size, 1)
    with on(source):
        if source.numel():
            _encode[(-(-rows * groups // per),)](
                words(source), packed, words(scales), packed if zeros is None else zeros, rows, columns,
                source.stride(0), group_size, groups, torch.finfo(weight.dtype).eps, SIZE=size, PER=per,
                TOP=float(2 ** (bits - 1)), SYMMETRIC=symmetric, KIND=TRITON_DTYPES[weight.dtype], **EXACT,
            )  # fmt: skip
    return packed, scales, zeros


@triton.jit(do_not_specialize=["rows", "groups"])
def _decode(codes, scale, zero, out, rows, columns, group, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            ZERO: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    row, column, inside = rectangle(rows, columns, ROWS, COLUMNS)
    index = row * groups + column // group
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.float32)
    if ZERO:
        code -= tl.load(zero + index, mask=inside, other=0).to(tl.float32)
    decoded = code * widened(tl.load(scale + index, mask=inside, other=0), SCALES)
    tl.store(out + row * columns + column, narrowed(decoded, KIND), mask=inside)


def dequantize_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Equal to the reference's."""
    source, scales = codes.contiguous(), scale.contiguous()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    grid, sizes = covering(*codes.shape)
    with on(source):
        if out.numel():
            _decode[grid](
                source, words(scales), source if zero is None else zero.contiguous(), words(out), *codes.shape,
                group_size, scale.shape[1], ZERO=zero is not None, SCALES=TRITON_DTYPES[scale.dtype],
                KIND=TRITON_DTYPES[dtype], **sizes, **EXACT,
            )  # fmt: skip
    return out
