"""float8 e4m3 with scales of tiles or rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.kernels import reference
from distquant.kernels.cpu.library import FLOATS, call, matrix, on_cpu, positive
from distquant.kernels.cpu.matrices import encode_scaled_rows
from distquant.kernels.cpu.runs import CPU, output
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.fp8 import Block


def block_amax(weight: Tensor, block: Block) -> Tensor:
    """float32 `[ceil(rows / br), ceil(columns / bc)]`: each tile's largest magnitude; NaN where it has a NaN.

    Equal to `reference.block_amax`.

    Raises:
        ValueError: an argument is invalid.
    """
    source, rows, columns = matrix(weight)
    height, width, grid = _tile(rows, columns, block)
    # The library reduces along rows, where nearly all elements are. Over the rows of a tile, torch is fast enough.
    amax = torch.empty(rows, grid[1], dtype=torch.float32)
    call("row_amax", source, FLOATS[source.dtype], rows, columns, width, amax)
    return amax if height == 1 else reference.block_amax(amax, (height, 1))


def _tile(rows: int, columns: int, block: Block) -> tuple[int, int, tuple[int, int]]:
    """Returns rows and columns of a full tile, and the shape of the scales."""
    height = max(rows, 1) if block[0] is None else positive(block[0], "rows of a block")
    width = max(columns, 1) if block[1] is None else positive(block[1], "columns of a block")
    return height, width, (-(-rows // height), -(-columns // width))


def quantize_fp8(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn `[rows, columns]`) and scales (float32 `[ceil(rows / br), ceil(columns / bc)]`).

    Equal to `reference.quantize_fp8`.

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`.
        block: rows and columns of a tile, None for the full dim.
        codes, scale: written into where given.

    Raises:
        ValueError: an argument is invalid.
    """
    return _quantize_tiles("quantize_fp8", weight, block, torch.float32, codes, scale)


def _quantize_tiles(
    function: str, weight: Tensor, block: Block, scale_dtype: torch.dtype, codes: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Calls a function that computes the scales of tiles and the codes under them."""
    source, rows, columns = matrix(weight)
    height, width, grid = _tile(rows, columns, block)
    packed = prepared(codes, (rows, columns), torch.float8_e4m3fn, CPU)
    scale = prepared(scale, grid, scale_dtype, CPU)
    call(function, source, FLOATS[source.dtype], rows, columns, height, width, packed, scale)
    return packed, scale


def encode_fp8(
    weight: Tensor, amax: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Like `quantize_fp8`, under given amax (float32 `[ceil(rows / br), ceil(columns / bc)]`) that shards may share."""
    source, rows, columns = matrix(weight)
    height, width, grid = _tile(rows, columns, block)
    packed = prepared(codes, (rows, columns), torch.float8_e4m3fn, CPU)
    scale = prepared(scale, grid, torch.float32, CPU)
    # The library turns the amax into factors in place, and the caller's amax may belong to other shards too.
    factors = on_cpu(amax, "amax", torch.float32, grid[0] * grid[1]).clone()
    call("encode_fp8", source, FLOATS[source.dtype], rows, columns, height, width, packed, scale, factors)
    return packed, scale


def quantize_fp8_ue8m0(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn `[rows, columns]`) and scales (float8_e8m0fnu `[ceil(rows / br), ceil(columns / bc)]`).

    Equal to `reference.quantize_fp8_ue8m0`.

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`.
        block: rows and columns of a tile, None for the full dim.
        codes, scale: written into where given.

    Raises:
        ValueError: an argument is invalid.
    """
    return _quantize_tiles("quantize_fp8_ue8m0", weight, block, torch.float8_e8m0fnu, codes, scale)


def quantize_fp8_rows(
    weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn `[rows, columns]`) and scales (float32 `[rows, 1]`) as FBGEMM has them.

    Equal to `reference.quantize_fp8_rows`.

    Raises:
        ValueError: an argument is invalid.
    """
    stored = prepared(scale, (len(weight), 1), torch.float32, CPU)
    reference.fbgemm_scales(block_amax(weight, (1, None)), stored)
    return encode_scaled_rows(weight, stored, torch.float8_e4m3fn, codes=codes), stored


def dequantize_fp8(codes: Tensor, scale: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dtype` `[rows, columns]`: the float32 product of each code's value and its tile's scale, then cast.

    Args:
        codes: float8_e4m3fn `[rows, columns]`.
        scale: float32 `[ceil(rows / br), ceil(columns / bc)]`.
        block: rows and columns of a tile, None for the full dim.
        dtype: bfloat16, float16 or float32.

    Raises:
        ValueError: an argument is invalid.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {list(codes.shape)}, not that of a matrix")
    rows, columns = codes.shape
    height, width, grid = _tile(rows, columns, block)
    packed = on_cpu(codes, "codes", torch.float8_e4m3fn)
    scales = on_cpu(scale, "scale", torch.float32, grid[0] * grid[1])
    out = output((rows, columns), dtype)
    call("dequantize_fp8", packed, scales, rows, columns, height, width, out, FLOATS[dtype])
    return out
