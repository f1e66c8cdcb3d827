"""int8 rows: definitions in `distquant.kernels.reference.int8`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import magnitude, reciprocal, rounded, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, by_rows, on, power, words
from distquant.kernels.outputs import prepared

WIDEST = 8192
"""Columns that one program holds; wider rows are read again, from the cache, to be encoded."""


@triton.jit
def _halves(weight, row, column, stride, rows, columns, KIND: tl.constexpr):
    """float32 `[PER, WIDTH]` of the float16 weights at these rows and columns."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(weight + row[:, None] * stride + column[None, :], mask=inside, other=0)
    return widened(x, KIND).to(tl.float16).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _encode(weight, absmax, codes, rows, columns, stride, WIDTH: tl.constexpr, PER: tl.constexpr,
            GIVEN: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """`PER` rows, `WIDTH` columns in each step; read twice unless the absmax are given."""
    row = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    column = tl.arange(0, WIDTH)
    if GIVEN:
        largest = tl.load(absmax + row, mask=row < rows, other=1.0)
    else:
        highest = tl.zeros((PER, WIDTH), tl.int32)
        for first in range(0, columns, WIDTH):
            x = _halves(weight, row, first + column, stride, rows, columns, KIND)
            highest = tl.maximum(highest, magnitude(x))
        largest = tl.max(highest, axis=1).to(tl.float32, bitcast=True)
        tl.store(absmax + row, largest, mask=row < rows)
    factor = (reciprocal(largest) * 127.0)[:, None]
    for first in range(0, columns, WIDTH):
        here = first + column
        x = _halves(weight, row, here, stride, rows, columns, KIND)
        inside = (row < rows)[:, None] & (here < columns)[None, :]
        tl.store(codes + row[:, None] * columns + here[None, :], rounded(x * factor).to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _encode_held(weight, absmax, codes, rows, columns, stride, WIDTH: tl.constexpr, PER: tl.constexpr,
                 KIND: tl.constexpr):  # fmt: skip
    """`PER` rows of at most `WIDTH` columns, held from the search of their absmax to their codes."""
    row = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    column = tl.arange(0, WIDTH)
    x = _halves(weight, row, column, stride, rows, columns, KIND)
    largest = tl.max(magnitude(x), axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + row, largest, mask=row < rows)
    code = rounded(x * (reciprocal(largest) * 127.0)[:, None]).to(tl.int8)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(codes + row[:, None] * columns + column[None, :], code, mask=inside)


def _run(weight: Tensor, absmax: Tensor, codes: Tensor, given: bool) -> None:
    rows, columns = weight.shape
    source = by_rows(weight)
    width = min(power(columns), WIDEST)
    per = max(4096 // width, 1)
    with on(source):
        if not source.numel():
            return
        grid, sizes = (-(-rows // per),), (rows, columns, source.stride(0))
        options = {"WIDTH": width, "PER": per, "KIND": TRITON_DTYPES[weight.dtype], **EXACT}
        if given or columns > width:
            _encode[grid](words(source), absmax, codes, *sizes, GIVEN=given, **options)
        else:
            _encode_held[grid](words(source), absmax, codes, *sizes, **options)


def encode_int8_rows(weight: Tensor, absmax: Tensor, out: Tensor | None = None) -> Tensor:
    """Equal to the reference's."""
    codes = prepared(out, tuple(weight.shape), torch.int8, weight.device)
    _run(weight, absmax.contiguous(), codes, True)
    return codes


def quantize_int8_rows(
    weight: Tensor, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    absmax = prepared(absmax, (len(weight),), torch.float32, weight.device)
    packed = prepared(codes, tuple(weight.shape), torch.int8, weight.device)
    _run(weight, absmax, packed, False)
    return packed, absmax
