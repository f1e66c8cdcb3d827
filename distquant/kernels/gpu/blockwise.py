"""8-bit codes of double quantization: definitions in `distquant.kernels.reference.blockwise`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import clamped, magnitude, reciprocal, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, on, power, words
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.blockwise import GRID, blockwise_table_of

POINTS = tl.constexpr(GRID)


@triton.jit(do_not_specialize=["count", "blocks"])
def _encode(values, table, absmax, codes, count, blocks, blocksize, SIZE: tl.constexpr, PER: tl.constexpr,
            KIND: tl.constexpr):  # fmt: skip
    """`PER` blocks, each padded to `SIZE` values."""
    block = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    within = tl.arange(0, SIZE)[None, :]
    offsets = block[:, None] * blocksize + within
    inside = (within < blocksize) & (offsets < count)
    x = widened(tl.load(values + offsets, mask=inside, other=0), KIND)
    largest = tl.max(tl.where(x == x, magnitude(x), 0), axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + block, largest, mask=block < blocks)
    scaled = clamped(x * reciprocal(largest)[:, None], -1.0, 1.0)
    # float64 holds the product, so that the sum's rounding to float32 is the only one.
    half = ((scaled + 1.0) * 0.5).to(tl.float64)
    point = (half * (POINTS - 1) + 0.5).to(tl.float32)
    index = tl.where(point == point, point, 0.0).to(tl.int32)
    tl.store(codes + offsets, tl.load(table + index), mask=inside)


def quantize_blockwise(
    values: Tensor, code: Tensor, blocksize: int, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    flat = values.reshape(-1)
    absmax = prepared(absmax, (-(-flat.numel() // blocksize),), torch.float32, flat.device)
    packed = prepared(codes, (flat.numel(),), torch.uint8, flat.device)
    size = power(blocksize)
    per = max(1024 // size, 1)
    with on(flat):
        if flat.numel():
            _encode[(-(-len(absmax) // per),)](
                words(flat), blockwise_table_of(code), absmax, packed, flat.numel(), len(absmax), blocksize,
                SIZE=size, PER=per, KIND=TRITON_DTYPES[flat.dtype], **EXACT,
            )  # fmt: skip
    return packed, absmax
