"""float8 e4m3 with one scale per tile of the matrix, per row, or per tensor.

By the definition of transformers' quantization on the fly (5.23, `integrations/finegrained_fp8.py`, `Fp8Quantize`), in
float32 whatever the weight's dtype:

    factor = reciprocal(amax) * 448           two roundings; 1 where amax is 0 or NaN, or where the factor is infinite
    code   = e4m3(clamp(weight * factor, -448, 448))      rounded half to even
    scale  = reciprocal(factor)               stored, what dequantization multiplies with

There are two differences. Upstream leaves matrices unquantized that tiles do not divide; here a ragged tile has its own
amax. If amax is so small that the factor overflows (below 1.4e-36), upstream's zeros become NaN; here the tile's codes
are zeros under scale 1.

Two more forms share its codes:

- scales that are powers of two (ue8m0, the same function of transformers under `scale_fmt`), of tiles or of runs of 32
  columns (MXFP8). `factor` without the bound on infinity gives `reciprocal(factor)` as above. The scale is the smallest
  power of two from 2^-126 on that is not less, and `code = e4m3(clamp(weight / scale, -448, 448))`. Upstream takes the
  exponent by a logarithm in float32, which is too small for a value just above a power of two. Weights of bfloat16 or
  float16 have no such values, except two amax above 2^126.
- rows as FBGEMM has them (`fbgemm_gpu/experimental/gen_ai/src/quantize/quantize.cu`, `quantize_fp8_per_row`), with
  divisions: `scale = max(amax / 448, 1 / (448 * 512))` and `code = e4m3(clamp(weight / scale, -448, 448))`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distquant.kernels.numbers import number_like
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.scaled_rows import E4M3_NAN, encode_scaled_rows
from distquant.kernels.reference.tiles import at_once

FP8_MAX = 448.0
"""Largest finite e4m3 value."""
MANTISSA = 23
"""Bits of a float32's fraction."""
SMALLEST_POWER = torch.finfo(torch.float32).tiny
"""The least scale of ue8m0 that is ever stored, 2^-126."""
LEAST_OF_ROWS = 1 / (FP8_MAX * 512)
"""The least scale of FBGEMM's rows."""

Block = tuple["int | None", "int | None"]


def tile_shape(shape: tuple[int, ...] | torch.Size, block: Block) -> tuple[int, int]:
    """Returns rows and columns of a full tile of a matrix of `shape`; None in `block` means the full dim."""
    rows, columns = shape
    tile = (rows if block[0] is None else block[0], columns if block[1] is None else block[1])
    return max(tile[0], 1), max(tile[1], 1)


def _scales_shape(shape: torch.Size, tile: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def block_amax(weight: Tensor, block: Block) -> Tensor:
    """float32 `[ceil(rows / br), ceil(columns / bc)]`: each tile's largest magnitude; NaN where it has a NaN."""
    tile = tile_shape(weight.shape, block)
    amax = torch.zeros(_scales_shape(weight.shape, tile), dtype=torch.float32, device=weight.device)
    rows, columns = (size // part * part for size, part in zip(weight.shape, tile, strict=True))
    for row_part in (slice(0, rows), slice(rows, None)):
        for column_part in (slice(0, columns), slice(columns, None)):
            part = weight[row_part, column_part]
            if part.numel():
                height, width = min(tile[0], part.shape[0]), min(tile[1], part.shape[1])
                tiles = part.unflatten(1, (-1, width)).unflatten(0, (-1, height))
                # Two reductions read twice, abs() would write a copy.
                largest = torch.maximum(tiles.amax((1, 3)), tiles.amin((1, 3)).neg_())
                first = (row_part.start // tile[0], column_part.start // tile[1])
                amax[first[0] : first[0] + largest.shape[0], first[1] : first[1] + largest.shape[1]] = largest
    return amax.abs_()


def fp8_factors(amax: Tensor) -> Tensor:
    """float32 like `amax`: what weights are multiplied by before they become e4m3."""
    factor = amax.reciprocal() * FP8_MAX
    return torch.where((amax > 0) & (factor < torch.inf), factor, 1.0)


def encode_fp8(
    weight: Tensor, amax: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Like `quantize_fp8`, under given amax (float32 `[ceil(rows / br), ceil(columns / bc)]`) that shards may share."""
    tile = tile_shape(weight.shape, block)
    factors = fp8_factors(amax)
    stored = prepared(scale, _scales_shape(weight.shape, tile), torch.float32, weight.device)
    torch.reciprocal(factors, out=stored)
    packed = prepared(codes, tuple(weight.shape), torch.float8_e4m3fn, weight.device)
    _cast(weight, factors, tile, torch.mul, packed)
    return packed, stored


def _cast(weight: Tensor, values: Tensor, tile: tuple[int, int], scaled: Callable[..., Tensor], packed: Tensor) -> None:
    """Fills `packed` with the e4m3 of `scaled(weight, value of its tile)`."""
    row_of = torch.arange(weight.shape[0], device=weight.device) // tile[0]
    column_of = torch.arange(weight.shape[1], device=weight.device) // tile[1]
    step = max(at_once(weight.device) // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), step):
        value = values[row_of[start : start + step]]
        value = value if value.shape[1] == 1 else value[:, column_of]
        result = scaled(weight[start : start + step].float(), value)
        packed[start : start + step] = result.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    bits = packed.view(torch.uint8)
    bits.masked_fill_(bits == (E4M3_NAN | 0x80), E4M3_NAN)


def quantize_fp8(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn `[rows, columns]`) and scales (float32 `[ceil(rows / br), ceil(columns / bc)]`).

    Args:
        weight: float `[rows, columns]`.
        block: rows and columns of a tile, None for the full dim: `(128, 128)` tiles with ragged edges, `(1, None)`
            rows, `(None, None)` the tensor.
        codes, scale: written into where given.

    A tile of zeros has scale 1, and -0.0 keeps its sign. A NaN gets the NaN code 0x7F; the other elements of its tile
    are cast under scale 1, clamped to 448. An infinity makes the tile's scale infinite: itself it becomes NaN, the
    finite elements zeros (which an infinite scale dequantizes to NaN).
    """
    return encode_fp8(weight, block_amax(weight, block), block, codes=codes, scale=scale)


def ue8m0_scales(amax: Tensor) -> Tensor:
    """float8_e8m0fnu like `amax` (float32): the power of two that a tile of that amax is divided by.

    1 where amax is 0 or NaN; NaN (0xFF) where it is infinite.
    """
    inverse = torch.where(amax > 0, amax.reciprocal() * FP8_MAX, 1.0).reciprocal_()
    # The exponent's bits of a float32 are those of ue8m0; a fraction that is not 0 carries into them.
    bits = inverse.clamp_(min=SMALLEST_POWER).view(torch.int32) + ((1 << MANTISSA) - 1)
    return (bits >> MANTISSA).to(torch.uint8).view(torch.float8_e8m0fnu)


def quantize_fp8_ue8m0(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn `[rows, columns]`) and scales (float8_e8m0fnu `[ceil(rows / br), ceil(columns / bc)]`).

    Args:
        weight: float `[rows, columns]`.
        block: rows and columns of a tile, None for the full dim: `(1, 32)` is MXFP8.
        codes, scale: written into where given.

    A tile of zeros has scale 1. In a tile with a NaN this is cast to the NaN code 0x7F, the other elements under scale
    1. A tile with an infinity has scale NaN, and so are all its codes.
    """
    tile = tile_shape(weight.shape, block)
    stored = prepared(scale, _scales_shape(weight.shape, tile), torch.float8_e8m0fnu, weight.device)
    stored.copy_(ue8m0_scales(block_amax(weight, block)))
    packed = prepared(codes, tuple(weight.shape), torch.float8_e4m3fn, weight.device)
    _cast(weight, stored.float(), tile, torch.div, packed)
    return packed, stored


def fbgemm_scales(amax: Tensor, out: Tensor) -> None:
    """Fills `out` (float32 like `amax`) with what FBGEMM divides rows of that amax by."""
    # Tensors, because torch on CUDA multiplies by the reciprocal of a plain number.
    largest, least = (number_like(v, amax) for v in (FP8_MAX, LEAST_OF_ROWS))
    torch.maximum(amax / largest, least, out=out)


def quantize_fp8_rows(
    weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn `[rows, columns]`) and scales (float32 `[rows, 1]`) as FBGEMM has them.

    Args:
        weight: float `[rows, columns]`; FBGEMM itself takes bfloat16 only.
        codes, scale: written into where given.

    A row with a NaN has scale NaN, and so are all its codes. In a row with an infinity this becomes NaN, the finite
    elements zeros, under an infinite scale.
    """
    stored = prepared(scale, (len(weight), 1), torch.float32, weight.device)
    fbgemm_scales(block_amax(weight, (1, None)), stored)
    return encode_scaled_rows(weight, stored, torch.float8_e4m3fn, codes=codes), stored


def dequantize_fp8(codes: Tensor, scale: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dtype` `[rows, columns]`: the float32 product of each code's value and its tile's scale, then cast."""
    tile = tile_shape(codes.shape, block)
    row_of = torch.arange(codes.shape[0], device=codes.device) // tile[0]
    column_of = torch.arange(codes.shape[1], device=codes.device) // tile[1]
    rows = scale[row_of]
    return (codes.float() * (rows if rows.shape[1] == 1 else rows[:, column_of])).to(dtype)
