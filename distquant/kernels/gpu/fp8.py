"""e4m3 tiles: definitions in `distquant.kernels.reference.fp8`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import clamped, e4m3, magnitude, narrowed, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, by_rows, on, power, words
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.fp8 import FP8_MAX, Block, tile_shape

LARGEST = tl.constexpr(FP8_MAX)
HELD = 32768
"""Elements of a tile that one program holds; larger tiles are read twice: for their amax, and to be encoded."""


@triton.jit
def _place(tiles_across, down, across, rows, columns, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns this program's tile, and rows, columns and mask of its part, one of `down * across` parts of the tile."""
    program = tl.program_id(0).to(tl.int64)
    tile, part = program // (down * across), program % (down * across)
    in_row = part // across * ROWS + tl.arange(0, ROWS)
    in_column = part % across * COLUMNS + tl.arange(0, COLUMNS)
    row = tile // tiles_across * height + in_row
    column = tile % tiles_across * width + in_column
    inside = ((in_row < height) & (row < rows))[:, None] & ((in_column < width) & (column < columns))[None, :]
    return tile, row[:, None], column[None, :], inside


@triton.jit
def _largest(weight, amax, tiles_across, down, across, rows, columns, stride, height, width,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Adds a part's amax to that of its tile, as bits."""
    tile, row, column, inside = _place(tiles_across, down, across, rows, columns, height, width, ROWS, COLUMNS)
    x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
    tl.atomic_max(amax + tile, tl.max(tl.max(magnitude(x), axis=1), axis=0))


@triton.jit
def _encode(weight, amax, codes, scale, tiles_across, down, across, rows, columns, stride, height, width,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, GIVEN: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Stores the codes of a part of a tile, and the tile's scale, equal in all its parts.

    Without a given amax the part must be the full tile.
    """
    tile, row, column, inside = _place(tiles_across, down, across, rows, columns, height, width, ROWS, COLUMNS)
    x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
    if GIVEN:
        largest = tl.load(amax + tile)
    else:
        largest = tl.max(tl.max(magnitude(x), axis=1), axis=0).to(tl.float32, bitcast=True)
    factor = tl.div_rn(1.0, largest) * LARGEST
    factor = tl.where((largest > 0) & (factor < float("inf")), factor, 1.0)
    tl.store(scale + tile, tl.div_rn(1.0, factor))
    tl.store(codes + row * columns + column, e4m3(clamped(x * factor, -LARGEST, LARGEST)), mask=inside)


@triton.jit
def _decode(codes, scale, out, tiles_across, columns, height, width, count, PER: tl.constexpr, KIND: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    code = tl.load(codes + offsets, mask=offsets < count, other=0).to(tl.int32)
    size = code & 0x7F
    # Below 8 a subnormal: steps of 2^-9; else the exponent is rebiased from 7 to 127.
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = (value.to(tl.int32, bitcast=True) | ((code >> 7) << 31)).to(tl.float32, bitcast=True)
    value = tl.where(size == 0x7F, float("nan"), value)
    tile = offsets // columns // height * tiles_across + offsets % columns // width
    decoded = value * tl.load(scale + tile, mask=offsets < count, other=0.0)
    tl.store(out + offsets, narrowed(decoded, KIND), mask=offsets < count)


def _parts(tile: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the number of parts of a tile down and across, and the rows and columns of a part, powers of two."""
    rows, columns = power(tile[0]), power(tile[1])
    if rows * columns > HELD:
        columns = min(columns, 4096)
        rows = min(rows, max(8192 // columns, 1))
    return -(-tile[0] // rows), -(-tile[1] // columns), rows, columns


def encode_fp8(
    weight: Tensor, amax: Tensor | None, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's; if `amax` is None it is computed from the weight."""
    tile = tile_shape(weight.shape, block)
    scales_shape = (-(-weight.shape[0] // tile[0]), -(-weight.shape[1] // tile[1]))
    stored = prepared(scale, scales_shape, torch.float32, weight.device)
    packed = prepared(codes, tuple(weight.shape), torch.float8_e4m3fn, weight.device)
    source = by_rows(weight)
    down, across, rows, columns = _parts(tile)
    grid = (stored.numel() * down * across,)
    where = (scales_shape[1], down, across, *weight.shape, source.stride(0), *tile)
    with on(source):
        if not source.numel():
            return packed, stored
        options = {"ROWS": rows, "COLUMNS": columns, "KIND": TRITON_DTYPES[weight.dtype], **EXACT}
        options["num_warps"] = 8 if rows * columns > 8192 else 4
        if amax is None and down * across > 1:
            amax = torch.zeros(scales_shape, dtype=torch.float32, device=weight.device)
            _largest[grid](words(source), amax.view(torch.int32), *where, **options)
        _encode[grid](
            words(source), stored if amax is None else amax.contiguous(), packed.view(torch.uint8), stored, *where,
            GIVEN=amax is not None, **options,
        )  # fmt: skip
    return packed, stored


def quantize_fp8(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    return encode_fp8(weight, None, block, codes=codes, scale=scale)


def dequantize_fp8(codes: Tensor, scale: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal to the reference's."""
    height, width = tile_shape(codes.shape, block)
    source = codes.contiguous().view(torch.uint8)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    with on(source):
        if out.numel():
            _decode[(-(-out.numel() // 4096),)](
                source, scale.contiguous(), words(out), scale.shape[1], codes.shape[1], height, width, out.numel(),
                PER=4096, KIND=TRITON_DTYPES[dtype], **EXACT,
            )  # fmt: skip
    return out
