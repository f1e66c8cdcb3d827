"""Codes of rows under given scales: definitions in `distquant.kernels.reference.scaled_rows`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import clamped, e4m3, reciprocal, rounded, rounded_to, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, by_rows, on, words
from distquant.kernels.gpu.rectangles import covering, rectangle
from distquant.kernels.outputs import prepared
from distquant.kernels.reference import scaled_rows as truth
from distquant.kernels.reference.fp8 import FP8_MAX

LARGEST = tl.constexpr(FP8_MAX)


@triton.jit(do_not_specialize=["rows"])
def _encode(weight, scale, codes, rows, columns, stride, low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            INVERSE: tl.constexpr, ROUNDED: tl.constexpr, INTEGER: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    row, column, inside = rectangle(rows, columns, ROWS, COLUMNS)
    x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
    by = tl.load(scale + row, mask=row < rows, other=1.0)
    if INVERSE:
        value = x * reciprocal(by)
    else:
        value = tl.div_rn(x, tl.broadcast_to(by, (ROWS, COLUMNS)))
    if ROUNDED:
        value = rounded_to(value, KIND)
    if INTEGER:
        code = rounded(clamped(value, low, high))  # bounds are whole, so that the order of the two is free
        code = tl.where(by == 0, 0, code).to(tl.int8)
    else:
        code = e4m3(clamped(tl.where(by == 0, 0.0, value), -LARGEST, LARGEST))
    tl.store(codes + row * columns + column, code, mask=inside)


def encode_scaled_rows(
    weight: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    inverse: bool = False,
    rounded: bool = False,
    low: int = -128,
    high: int = 127,
    codes: Tensor | None = None,
) -> Tensor:
    """Equal to the reference's, which is called for float8 other than e4m3."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return truth.encode_scaled_rows(
            weight, scale, dtype, inverse=inverse, rounded=rounded, low=low, high=high, codes=codes
        )
    packed = prepared(codes, tuple(weight.shape), dtype, weight.device)
    source, (rows, columns) = by_rows(weight), weight.shape
    grid, sizes = covering(rows, columns)
    integer = not dtype.is_floating_point
    with on(source):
        if source.numel():
            _encode[grid](
                words(source), scale.reshape(-1).contiguous(), packed if integer else packed.view(torch.uint8),
                rows, columns, source.stride(0), float(low), float(high), INVERSE=inverse, ROUNDED=rounded,
                INTEGER=integer, KIND=TRITON_DTYPES[weight.dtype], **sizes, **EXACT,
            )  # fmt: skip
    return packed
