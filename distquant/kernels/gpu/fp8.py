"""e4m3 tiles: definitions in `distquant.kernels.reference.fp8`.

Two ways lead through a weight. Tiles of one row that are not wide are held in registers, many of them by one program.
Other tiles are walked in parts, twice: for their amax, and to be encoded. A tile is small enough to be in the cache the
second time, and a thread has few elements at once: registers spill to memory where it holds a whole tile. Only tiles
that would leave most of a GPU idle (the whole weight) have a kernel of their own for the amax.
"""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import clamped, e4m3, magnitude, narrowed, reciprocal, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, by_rows, on, power, words
from distquant.kernels.gpu.rectangles import covering, rectangle
from distquant.kernels.outputs import prepared
from distquant.kernels.reference import fp8 as truth
from distquant.kernels.reference.fp8 import Block, tile_shape

LARGEST = tl.constexpr(truth.FP8_MAX)
LEAST_OF_ROWS = tl.constexpr(truth.LEAST_OF_ROWS)
LEAST_POWER = tl.constexpr(truth.SMALLEST_POWER)
FACTORS, POWERS, ROWS_OF_FBGEMM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""How a tile's amax becomes its scale: the three forms of the definitions."""

HELD = 8192
"""Columns of a tile of one row that one program holds."""
PER_PROGRAM = 4096
"""Elements that one program takes at once, where rows are not wider."""
WALKED = 1 << 17
"""Elements of a tile that one program walks through."""


@triton.jit
def _scales(largest, FORM: tl.constexpr):
    """Returns what weights are multiplied by (`FACTORS`) or divided by, and the scale as it is stored."""
    if FORM == ROWS_OF_FBGEMM:
        quotient = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
        by = tl.where(quotient < LEAST_OF_ROWS, LEAST_OF_ROWS, quotient)
        return by, by
    elif FORM == FACTORS:
        factor = reciprocal(largest) * LARGEST
        by = tl.where((largest > 0) & (factor < float("inf")), factor, 1.0)
        return by, reciprocal(by)
    else:
        inverse = reciprocal(tl.where(largest > 0, reciprocal(largest) * LARGEST, 1.0))
        inverse = tl.where(inverse < LEAST_POWER, LEAST_POWER, inverse)
        # A fraction that is not 0 carries into the exponent; that of infinity is ue8m0's NaN.
        byte = (inverse.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        by = tl.where(byte == 255, float("nan"), (byte << 23).to(tl.float32, bitcast=True))
        return by, byte.to(tl.uint8)


@triton.jit
def _codes(x, by, FORM: tl.constexpr):
    """uint8: codes of `x` (float32 `[rows, columns]`); `by` broadcasts to it."""
    if FORM == FACTORS:
        scaled = x * by
    else:
        scaled = tl.div_rn(x, tl.broadcast_to(by, x.shape))
    return e4m3(clamped(scaled, -LARGEST, LARGEST))


@triton.jit(do_not_specialize=["rows", "runs"])
def _encode_runs(weight, amax, codes, scale, rows, columns, stride, width, across, runs, PER: tl.constexpr,
                 SIZE: tl.constexpr, GIVEN: tl.constexpr, FORM: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """`PER` tiles of one row, each padded to `SIZE` columns."""
    run = tl.program_id(0) * PER + tl.arange(0, PER)[:, None]  # 32 bits: 2^31 tiles would be of one weight
    row, within = (run // across).to(tl.int64), tl.arange(0, SIZE)[None, :]
    column = run % across * width + within
    inside = (within < width) & (column < columns) & (run < runs)
    x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
    if GIVEN:
        largest = tl.load(amax + run, mask=run < runs, other=1.0)
    else:
        largest = tl.max(magnitude(x), axis=1, keep_dims=True).to(tl.float32, bitcast=True)
    by, stored = _scales(largest, FORM)
    tl.store(scale + run, stored, mask=run < runs)
    tl.store(codes + row * columns + column, _codes(x, by, FORM), mask=inside)


@triton.jit
def _part(part, tile, tiles_across, across, rows, columns, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows, columns and mask of one part of a tile."""
    in_row = part // across * ROWS + tl.arange(0, ROWS)
    in_column = part % across * COLUMNS + tl.arange(0, COLUMNS)
    row = (tile // tiles_across).to(tl.int64) * height + in_row
    column = tile % tiles_across * width + in_column
    inside = ((in_row < height) & (row < rows))[:, None] & ((in_column < width) & (column < columns))[None, :]
    return row[:, None], column[None, :], inside


@triton.jit(do_not_specialize=["rows", "down", "tiles_across"])
def _largest(weight, amax, tiles_across, down, across, rows, columns, stride, height, width,
             ROWS: tl.constexpr, COLUMNS: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Adds a part's amax to that of its tile, as bits."""
    tile, part = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    row, column, inside = _part(part, tile, tiles_across, across, rows, columns, height, width, ROWS, COLUMNS)
    x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
    tl.atomic_max(amax + tile, tl.max(tl.max(magnitude(x), axis=1), axis=0))


@triton.jit(do_not_specialize=["rows", "down", "tiles_across"])
def _encode_tiles(weight, amax, codes, scale, tiles_across, down, across, rows, columns, stride, height, width,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr, GIVEN: tl.constexpr, FORM: tl.constexpr,
                  KIND: tl.constexpr):  # fmt: skip
    """A tile in `down * across` parts, by one program; with a given amax by one for each part."""
    parts = down * across
    if GIVEN:
        tile = tl.program_id(0) // parts
        first = tl.program_id(0) % parts
        last = first + 1
        largest = tl.load(amax + tile + tl.zeros((1, 1), tl.int32))
    else:
        tile = tl.program_id(0)
        first, last = 0, parts
        highest = tl.zeros((ROWS, COLUMNS), tl.int32)
        for part in range(parts):
            row, column, inside = _part(part, tile, tiles_across, across, rows, columns, height, width, ROWS, COLUMNS)
            x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
            highest = tl.maximum(highest, magnitude(x))
        highest = tl.max(tl.max(highest, axis=1, keep_dims=True), axis=0, keep_dims=True)
        largest = highest.to(tl.float32, bitcast=True)
    by, stored = _scales(largest, FORM)
    tl.store(scale + tile + tl.zeros((1, 1), tl.int32), stored)
    for part in range(first, last):
        row, column, inside = _part(part, tile, tiles_across, across, rows, columns, height, width, ROWS, COLUMNS)
        x = widened(tl.load(weight + row * stride + column, mask=inside, other=0), KIND)
        tl.store(codes + row * columns + column, _codes(x, by, FORM), mask=inside)


def _quantize(
    weight: Tensor, amax: Tensor | None, block: Block, form: tl.constexpr, codes: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of one form, under the given amax or each tile's own."""
    rows, columns = weight.shape
    tile = tile_shape(weight.shape, block)
    down, across = -(-rows // tile[0]), -(-columns // tile[1])
    dtype = torch.float8_e8m0fnu if form is POWERS else torch.float32
    stored = prepared(scale, (down, across), dtype, weight.device)
    packed = prepared(codes, (rows, columns), torch.float8_e4m3fn, weight.device)
    source = by_rows(weight)
    with on(source):
        if not source.numel():
            return packed, stored
        targets = packed.view(torch.uint8), stored.view(torch.uint8) if form is POWERS else stored
        options = {"FORM": form.value, "KIND": TRITON_DTYPES[weight.dtype], **EXACT}
        if tile[0] == 1 and tile[1] <= HELD:
            size = power(tile[1])
            per, runs = max(PER_PROGRAM // size, 1), down * across
            options["num_warps"] = 8 if size > PER_PROGRAM else 4
            _encode_runs[(-(-runs // per),)](
                words(source), targets[1] if amax is None else amax.contiguous(), *targets, rows, columns,
                source.stride(0), tile[1], across, runs, PER=per, SIZE=size, GIVEN=amax is not None, **options,
            )  # fmt: skip
        else:
            _walk(source, amax, tile, (down, across), targets, options)
    return packed, stored


def _walk(
    source: Tensor, amax: Tensor | None, tile: tuple[int, int], tiles: tuple[int, int],
    targets: tuple[Tensor, Tensor], options: dict[str, object],
) -> None:  # fmt: skip
    """Launches the kernels that go through tiles in parts."""
    width = min(power(tile[1]), PER_PROGRAM)
    height = min(power(tile[0]), PER_PROGRAM // width)
    down, across, count = -(-tile[0] // height), -(-tile[1] // width), tiles[0] * tiles[1]
    where = (tiles[1], down, across, *source.shape, source.stride(0), *tile)
    part = {"ROWS": height, "COLUMNS": width}
    if amax is None and tile[0] * tile[1] > WALKED:
        amax = torch.zeros(tiles, dtype=torch.float32, device=source.device)
        kind = {name: value for name, value in options.items() if name != "FORM"}
        _largest[(count * down * across,)](words(source), amax.view(torch.int32), *where, **part, **kind)
    grid = count if amax is None else count * down * across
    given = targets[1] if amax is None else amax.contiguous()
    _encode_tiles[(grid,)](words(source), given, *targets, *where, **part, GIVEN=amax is not None, **options)


def encode_fp8(
    weight: Tensor, amax: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    return _quantize(weight, amax, block, FACTORS, codes, scale)


def quantize_fp8(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    return _quantize(weight, None, block, FACTORS, codes, scale)


def quantize_fp8_ue8m0(
    weight: Tensor, block: Block, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    return _quantize(weight, None, block, POWERS, codes, scale)


def quantize_fp8_rows(
    weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    return _quantize(weight, None, (1, None), ROWS_OF_FBGEMM, codes, scale)


@triton.jit(do_not_specialize=["rows", "tiles_across"])
def _decode(codes, scale, out, rows, columns, height, width, tiles_across, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            KIND: tl.constexpr):  # fmt: skip
    row, column, inside = rectangle(rows, columns, ROWS, COLUMNS)
    code = tl.load(codes + row * columns + column, mask=inside, other=0).to(tl.int32)
    size = code & 0x7F
    # Below 8 a subnormal: steps of 2^-9; else the exponent is rebiased from 7 to 127.
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = (value.to(tl.int32, bitcast=True) | ((code >> 7) << 31)).to(tl.float32, bitcast=True)
    value = tl.where(size == 0x7F, float("nan"), value)
    tile = row // height * tiles_across + column // width
    decoded = value * tl.load(scale + tile, mask=inside, other=0.0)
    tl.store(out + row * columns + column, narrowed(decoded, KIND), mask=inside)


def dequantize_fp8(codes: Tensor, scale: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal to the reference's."""
    tile, (rows, columns) = tile_shape(codes.shape, block), codes.shape
    source = codes.contiguous().view(torch.uint8)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    grid, sizes = covering(rows, columns)
    with on(source):
        if out.numel():
            _decode[grid](
                source, scale.contiguous(), words(out), rows, columns, *tile, scale.shape[1],
                KIND=TRITON_DTYPES[dtype], **sizes, **EXACT,
            )  # fmt: skip
    return out
