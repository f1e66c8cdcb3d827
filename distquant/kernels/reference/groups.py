"""Integers of 4 or 8 bits with a scale, and perhaps a zero point, per group of a row's columns.

By the definition of compressed-tensors 0.20 (`quantization/utils/helpers.py`, `calculate_qparams`, and
`quantization/lifecycle/forward_helpers.py`, `_quantize`) on the smallest and largest value of each group. Everything is
in the weight's own dtype, the scale too: each operation below is computed in float32 and rounded to that dtype.

    low, high = min(group, 0), max(group, 0);   q = 2^(bits - 1)
    symmetric:   scale = max(-low, high) / (q - 0.5);   code = clamp(round(x / scale), -q, q - 1)
    otherwise:   scale = (high - low) / (2 q - 1);      zero = round(clamp(-q - low / scale, -q, q - 1))
                 code = clamp(round(x / scale + zero), -q, q - 1)

`round` is half to even; divisions are not products with a reciprocal. A scale of 0 (a group of zeros, or one that
underflows) becomes the dtype's epsilon, after the zero point is computed, which is 0/0 for a group of zeros. The
library rejects groups that do not divide a row; here the last group of a row may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.kernels.numbers import number_like
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.tiles import at_once


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

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`.
        group_size: columns per scale.
        bits: 4 or 8; codes lie in [-8, 7] or [-128, 127].
        symmetric: True for groups without zero points: the third result is None. Otherwise it is int8 of the scale's
            shape.
        codes, scale, zero: written into where given.

    Wherever a code or a zero point would be NaN (a NaN or an infinity in the group, or the zero point of zeros), it is
    0. The scale of a group with a NaN is NaN, with an infinity infinite.

    Raises:
        ValueError: `bits` is neither 4 nor 8, or a given output does not fit.
    """
    check_bits(bits)
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    packed = prepared(codes, (rows, columns), torch.int8, weight.device)
    scales = prepared(scale, (rows, groups), weight.dtype, weight.device)
    zeros = None if symmetric else prepared(zero, (rows, groups), torch.int8, weight.device)
    step, full = max(at_once(weight.device) // max(columns, 1), 1), columns // group_size
    # Full groups form one tensor; a shorter last group cannot join them, and padding would change its range.
    for row in range(0, rows, step):
        for first, last, size in ((0, full, group_size), (full, groups, columns - full * group_size)):
            if first == last:
                continue
            here = (slice(row, row + step), slice(first, last))
            part = slice(first * group_size, first * group_size + (last - first) * size)
            grouped = weight[row : row + step, part].unflatten(1, (-1, size))
            parameters = _parameters(grouped, bits, symmetric)
            packed[row : row + step, part] = _encode(grouped, *parameters, bits).flatten(1)
            scales[here] = parameters[0]
            if zeros is not None and parameters[1] is not None:
                zeros[here] = parameters[1]
    return packed, scales, zeros


def check_bits(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"groups of {bits} bits: only 4 and 8 are supported")


def _parameters(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale (the dtype of `grouped`, `[rows, groups, size]`) and zero (int8), both `[rows, groups]`."""
    top = 2 ** (bits - 1)
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    zero = None
    if symmetric:
        scale = torch.maximum(low.abs(), high) / number_like(top - 0.5, low)
    else:
        scale = (high - low) / number_like(2 * top - 1, low)
        exact = (-top - low / scale).clamp_(-top, top - 1)
        zero = exact.round_().nan_to_num_(nan=0.0).to(torch.int8)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale), zero


def _encode(grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    top = 2 ** (bits - 1)
    scaled = grouped / scale.unsqueeze(-1)
    if zero is not None:
        scaled += zero.unsqueeze(-1).to(scaled.dtype)
    return scaled.clamp_(-top, top - 1).round_().nan_to_num_(nan=0.0).to(torch.int8)


def dequantize_groups(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dtype` `[rows, columns]`: the float32 product of `code - zero` and the group's scale, then cast.

    Into the scale's own dtype this is what the library gives: a product of two such numbers is exact in float32 where
    they have 8 or 11 bits.
    """
    columns = codes.shape[1]
    values = codes.float()
    if zero is not None:
        values -= zero.repeat_interleave(group_size, dim=1)[:, :columns].float()
    return (values * scale.repeat_interleave(group_size, dim=1)[:, :columns].float()).to(dtype)
