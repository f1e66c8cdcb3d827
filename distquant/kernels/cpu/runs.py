"""Formats whose blocks run over the flat weight: NF4, FP4, and the second level of double quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from distquant.kernels import reference
from distquant.kernels.cpu.library import COMPUTED, FLOATS, GIVEN, call, flat, on_cpu, positive
from distquant.kernels.outputs import prepared

CPU = torch.device("cpu")
SMALLEST, LARGEST = 32, 4096
"""Range of blocksizes of the 4-bit formats."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a 4-bit format for the library.

    Attributes:
        values: float32 `[16]`, the value of each code.
        thresholds: float32 `[15]`, ascending.
        order: uint8 `[16]`, the code of each rank.
    """

    values: Tensor
    thresholds: Tensor
    order: Tensor


@cache
def _tables(quant_type: str) -> Tables:
    orders = {"nf4": tuple(range(16)), "fp4": reference.FP4_ASCENDING}
    if quant_type not in orders:
        raise ValueError(f"unknown quant_type {quant_type!r}; known are 'nf4' and 'fp4'")
    values = reference.code_values(quant_type).clone()
    ascending = values[list(orders[quant_type])]
    thresholds = (ascending[:-1] + ascending[1:]) / 2
    return Tables(values, thresholds, torch.tensor(orders[quant_type], dtype=torch.uint8))


def _check_blocksize(blocksize: int) -> None:
    if blocksize % 2 or not SMALLEST <= blocksize <= LARGEST:
        raise ValueError(f"blocksize is {blocksize}, not even and in [{SMALLEST}, {LARGEST}]")


def quantize_4bit(
    weight: Tensor,
    blocksize: int,
    quant_type: str,
    *,
    codes: Tensor | None = None,
    absmax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[ceil(n / 2)]`) and absmax (float32 `[ceil(n / blocksize)]`) of the flat `weight`.

    Equal to `reference.quantize_4bit`.

    Args:
        weight: bfloat16, float16 or float32 of any shape, `n` elements.
        blocksize: elements per absmax, even, 32 to 4096.
        quant_type: `nf4` or `fp4`.
        codes, absmax: written into where given.

    Raises:
        ValueError: `n` is odd, or an argument is invalid.
    """
    _check_blocksize(blocksize)
    absmax = prepared(absmax, (-(-weight.numel() // blocksize),), torch.float32, CPU)
    return _codes_4bit(weight, absmax, COMPUTED, blocksize, quant_type, False, codes), absmax


def encode_4bit(
    weight: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    ragged: bool = False,
    *,
    codes: Tensor | None = None,
) -> Tensor:
    """uint8 `[ceil(n / 2)]`: codes of the flat `weight` under given absmax.

    Equal to `reference.encode_4bit`. Arguments and errors are those of `quantize_4bit`, and:

    Args:
        absmax: float32 `[ceil(n / blocksize)]`.
        ragged: True if the last block belongs to the weight's ragged tail although it is full here.
    """
    _check_blocksize(blocksize)
    given = on_cpu(absmax, "absmax", torch.float32, -(-weight.numel() // blocksize))
    return _codes_4bit(weight, given, GIVEN, blocksize, quant_type, ragged, codes)


def _codes_4bit(
    weight: Tensor,
    absmax: Tensor,
    statistics: int,
    blocksize: int,
    quant_type: str,
    ragged: bool,
    codes: Tensor | None,
) -> Tensor:
    tables, source = _tables(quant_type), flat(weight, "the weight")
    count, kind = source.numel(), FLOATS[source.dtype]
    if count % 2:
        raise ValueError(f"{count} codes do not fill whole bytes")
    packed = prepared(codes, (count // 2,), torch.uint8, CPU)
    encoding = (tables.thresholds, tables.order, packed, absmax, statistics, int(ragged))
    call("quantize_4bit", source, kind, count, blocksize, *encoding)
    return packed


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dtype` of `shape`: the float32 product of value and absmax, then cast to nearest even.

    Args:
        codes: uint8 of at least `ceil(n / 2)` elements, any shape.
        absmax: float32 `[ceil(n / blocksize)]`.
        blocksize: elements per absmax, even, 32 to 4096.
        quant_type: `nf4` or `fp4`.
        shape: of the result, `n` elements.
        dtype: bfloat16, float16 or float32.

    Raises:
        ValueError: an argument is invalid.
    """
    _check_blocksize(blocksize)
    tables, count = _tables(quant_type), math.prod(shape)
    out = output(shape, dtype)
    packed = on_cpu(codes, "codes", torch.uint8, (count + 1) // 2)
    scale = on_cpu(absmax, "absmax", torch.float32, -(-count // blocksize))
    call("dequantize_4bit", packed, scale, count, blocksize, tables.values, out, FLOATS[dtype])
    return out


def output(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns a new tensor; raises ValueError if the kernels do not write `dtype`."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; the CPU kernels write float32, float16 and bfloat16")
    return torch.empty(shape, dtype=dtype)


@lru_cache(maxsize=4)
def _nearest(code: bytes) -> Tensor:
    """uint8 `[65536]`: code of each grid point, for the bytes of 256 float32 values."""
    return reference.blockwise_table(torch.frombuffer(bytearray(code), dtype=torch.float32))


def quantize_blockwise(
    values: Tensor, code: Tensor, blocksize: int, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[n]`) and absmax (float32 `[ceil(n / blocksize)]`) of the flat `values`.

    Equal to `reference.quantize_blockwise`.

    Args:
        values: float of any shape, `n` elements.
        code: float32 `[256]`, ascending: the value of each code.
        blocksize: elements per absmax.
        codes, absmax: written into where given.

    Raises:
        ValueError: an argument is invalid.
    """
    positive(blocksize, "blocksize")
    source = flat(values, "values").float()
    table = on_cpu(code, "code", torch.float32)
    if table.numel() != 256:
        raise ValueError(f"code has {table.numel()} values, not 256")
    packed = prepared(codes, (source.numel(),), torch.uint8, CPU)
    absmax = prepared(absmax, (-(-source.numel() // blocksize),), torch.float32, CPU)
    nearest = _nearest(table.numpy().tobytes())
    call("quantize_blockwise", source, source.numel(), blocksize, nearest, packed, absmax)
    return packed, absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """float32 `[n]`: `code[codes] * absmax`, with one absmax per `blocksize` codes.

    Args:
        codes: uint8 `[n]`.
        absmax: float32 `[ceil(n / blocksize)]`.
        code: float32 `[256]`.

    Raises:
        ValueError: an argument is invalid.
    """
    positive(blocksize, "blocksize")
    packed = on_cpu(codes, "codes", torch.uint8)
    scale = on_cpu(absmax, "absmax", torch.float32, -(-packed.numel() // blocksize))
    table = on_cpu(code, "code", torch.float32, 256)
    out = torch.empty(packed.shape, dtype=torch.float32)
    call("dequantize_blockwise", packed, scale, table, packed.numel(), blocksize, out)
    return out
