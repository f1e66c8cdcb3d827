"""Formats with scales of rows or groups of a matrix: LLM.int8, scaled rows, integer groups, MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.kernels import reference
from distquant.kernels.cpu.library import CODES, COMPUTED, FLOATS, GIVEN, call, matrix, on_cpu, positive
from distquant.kernels.cpu.runs import CPU, output
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.mxfp4 import RUN, check_columns


def quantize_int8_rows(
    weight: Tensor, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (int8 `[rows, columns]`) and absmax (float32 `[rows]`) of `weight`, as LLM.int8 stores it.

    Equal to `reference.quantize_int8_rows`: one pass over a row finds its absmax after the cast to float16, the next
    rounds `w * (1 / absmax * 127)`.

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`, at least one column.
        codes, absmax: written into where given.

    Raises:
        ValueError: an argument is invalid.
    """
    source, rows, columns = matrix(weight)
    if columns == 0:
        raise ValueError(f"the weight has shape {list(weight.shape)}: a row without columns has no absmax")
    packed = prepared(codes, (rows, columns), torch.int8, CPU)
    absmax = prepared(absmax, (rows,), torch.float32, CPU)
    call("quantize_int8_rows", source, FLOATS[source.dtype], rows, columns, packed, absmax, COMPUTED)
    return packed, absmax


def encode_int8_rows(weight: Tensor, absmax: Tensor, out: Tensor | None = None) -> Tensor:
    """int8 `[rows, columns]`: codes of `weight` (`[rows, columns]`) under given row absmax (float32 `[rows]`).

    Equal to `reference.encode_int8_rows`; the absmax of a row must be at least its largest float16 magnitude.

    Raises:
        ValueError: an argument is invalid.
    """
    source, rows, columns = matrix(weight)
    packed = prepared(out, (rows, columns), torch.int8, CPU)
    given = on_cpu(absmax, "absmax", torch.float32, rows)
    call("quantize_int8_rows", source, FLOATS[source.dtype], rows, columns, packed, given, GIVEN)
    return packed


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
    """`dtype` `[rows, columns]`: equal to `reference.encode_scaled_rows`, which is called for float8 other than e4m3.

    Raises:
        ValueError: an argument is invalid.
    """
    if dtype not in CODES:
        rounding = {"inverse": inverse, "rounded": rounded}
        return reference.encode_scaled_rows(weight, scale, dtype, low=low, high=high, codes=codes, **rounding)
    source, rows, columns = matrix(weight)
    packed = prepared(codes, (rows, columns), dtype, CPU)
    given, kind = on_cpu(scale, "scale", torch.float32, rows), (CODES[dtype], inverse, rounded, low, high)
    call("encode_scaled_rows", source, FLOATS[source.dtype], rows, columns, given, packed, *kind)
    return packed


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
    """Codes (int8 `[rows, columns]`), scale (the weight's dtype `[rows, ceil(columns / group_size)]`), zero.

    Equal to `reference.quantize_groups`.

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`.
        group_size: columns per scale.
        bits: 4 or 8.
        symmetric: True for groups without zero points: the third result is None. Otherwise it is int8 of the scale's
            shape.
        codes, scale, zero: written into where given.

    Raises:
        ValueError: an argument is invalid.
    """
    if bits not in (4, 8):
        raise ValueError(f"groups of {bits} bits: only 4 and 8 are supported")
    source, rows, columns = matrix(weight)
    grid = (rows, -(-columns // positive(group_size, "group_size")))
    packed = prepared(codes, (rows, columns), torch.int8, CPU)
    scales = prepared(scale, grid, source.dtype, CPU)
    zeros = None if symmetric else prepared(zero, grid, torch.int8, CPU)
    kind = FLOATS[source.dtype]
    call("quantize_groups", source, kind, rows, columns, group_size, bits, packed, scales, zeros)
    return packed, scales, zeros


def dequantize_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dtype` `[rows, columns]`: the float32 product of `code - zero` and the group's scale, then cast.

    Args:
        codes: int8 `[rows, columns]`.
        scale: bfloat16, float16 or float32 `[rows, ceil(columns / group_size)]`.
        zero: int8 of the scale's shape, or None.
        dtype: bfloat16, float16 or float32.

    Raises:
        ValueError: an argument is invalid.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {list(codes.shape)}, not that of a matrix")
    rows, columns = codes.shape
    groups = rows * -(-columns // positive(group_size, "group_size"))
    packed = on_cpu(codes, "codes", torch.int8)
    scales = on_cpu(scale, "scale", None, groups).float()
    zeros = None if zero is None else on_cpu(zero, "zero", torch.int8, groups)
    out = output((rows, columns), dtype)
    call("dequantize_groups", packed, scales, zeros, rows, columns, group_size, out, FLOATS[dtype])
    return out


def quantize_mxfp4(
    weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[rows, columns / 2]`, the even column in the low nibble) and scales (uint8 `[rows, columns / 32]`).

    Equal to `reference.quantize_mxfp4`.

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`, full runs of 32.
        codes, scale: written into where given.

    Raises:
        ValueError: an argument is invalid.
    """
    source, rows, columns = matrix(weight)
    check_columns(columns)
    packed = prepared(codes, (rows, columns // 2), torch.uint8, CPU)
    scale = prepared(scale, (rows, columns // RUN), torch.uint8, CPU)
    call("quantize_mxfp4", source, FLOATS[source.dtype], rows * columns, packed, scale)
    return packed, scale


def dequantize_mxfp4(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dtype` `[rows, columns]`: the float32 product of each code's value and its run's scale, then cast.

    Args:
        codes: uint8 `[rows, columns / 2]`, full runs of 32 columns.
        scale: uint8 `[rows, columns / 32]`.
        dtype: bfloat16, float16 or float32.

    Raises:
        ValueError: an argument is invalid.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes have shape {list(codes.shape)}, not that of a matrix")
    rows, columns = codes.shape[0], codes.shape[1] * 2
    check_columns(columns)
    packed = on_cpu(codes, "codes", torch.uint8)
    scales = on_cpu(scale, "scale", torch.uint8, rows * columns // RUN)
    out = output((rows, columns), dtype)
    call("dequantize_mxfp4", packed, scales, rows * columns, out, FLOATS[dtype])
    return out
