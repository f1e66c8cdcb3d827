"""MXFP4 (OCP Microscaling Formats v1.0): e2m1 codes, two a byte, with a power of two for each 32 columns of a row.

    code     0    1    2    3    4    5    6    7     and 8 more of the negative values, from -0.0 on
    value    0    0.5  1    1.5  2    3    4    6

Scales are bytes `b`, e8m0, that stand for 2^(b - 127); 255 is NaN. On the fly, in float32 whatever the weight's dtype:

    b    = 127 + ceil(log2(amax / 6)), at least 1; 0 where amax / 6 is 0
    code = e2m1(weight * 2^(127 - b))                 rounded half to even; nothing is ever clamped

The scale is that of transformers' quantization on the fly (5.23, `integrations/mxfp4.py`, `quantize_to_mxfp4`: the
function `downcast_to_mxfp_torch` of triton_kernels with `ROUND_UP`). The specification's own conversion (section 6.3)
takes floor(log2(amax)) - 2, under which magnitudes above 6 are clamped. Rounding is that of the specification, and of
triton_kernels since it rounds as GPUs do (`cvt.rn`). The older copy that transformers 5.23 fetches
(kernels-community/gpt-oss-triton-kernels, version 1) rounds halves away from zero, and casts weights to bfloat16 first.
torchao 0.18 has the same bits (`prototype/mx_formats/mx_tensor.py`, `to_mx` with `RCEIL`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from distquant.kernels.numbers import number_like
from distquant.kernels.outputs import prepared
from distquant.kernels.reference.fp8 import MANTISSA, block_amax
from distquant.kernels.reference.tiles import at_once

RUN = 32
"""Columns that share a scale."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes of positive sign."""
NOT_FINITE = 255
"""Scale of a run with a NaN or an infinity: NaN."""
SMALLEST, NAN = 1 << (MANTISSA - 1), 0x1FF << (MANTISSA - 1)
"""float32's bits of the scales that are not normal numbers: 2^-127 and NaN."""


@cache
def e2m1_values(device: torch.device) -> Tensor:
    """float32 `[16]`: the value of each code."""
    positive = torch.tensor(E2M1, dtype=torch.float32, device=device)
    return torch.cat([positive, -positive])


def check_columns(columns: int) -> None:
    """Raises ValueError if runs do not divide a row."""
    if columns % RUN:
        raise ValueError(f"rows have {columns} columns, not a multiple of {RUN}")


def quantize_mxfp4(
    weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[rows, columns / 2]`, the even column in the low nibble) and scales (uint8 `[rows, columns / 32]`).

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`.
        codes, scale: written into where given.

    A run of zeros has scale 0, which is 2^-127, and -0.0 keeps its sign. A run with a NaN or an infinity has scale 255
    and codes 7, which dequantize to NaN (and to infinities where 255 is taken for a number).

    Raises:
        ValueError: `columns` is not a multiple of 32, or a given output does not fit.
    """
    rows, columns = weight.shape
    check_columns(columns)
    packed = prepared(codes, (rows, columns // 2), torch.uint8, weight.device)
    stored = prepared(scale, (rows, columns // RUN), torch.uint8, weight.device)
    step = max(at_once(weight.device) // max(columns, 1), 1)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        amax = block_amax(part, (1, RUN))
        byte = _scales(amax)
        stored[start : start + step] = byte
        # The bits of 2^(127 - byte); a run without a scale takes 0.
        inverse = ((254 - byte).clamp_(min=0) << MANTISSA).view(torch.float32)
        code = _codes(part.float().unflatten(1, (-1, RUN)) * inverse.unsqueeze(-1))
        pairs = code.masked_fill_((byte == NOT_FINITE).unsqueeze(-1), 7).view(len(part), -1, 2)
        packed[start : start + step] = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed, stored


def _scales(amax: Tensor) -> Tensor:
    """int32 like `amax` (float32): the byte of the smallest power of two that is not less than a sixth."""
    # A tensor: torch on CUDA multiplies by the reciprocal of a plain number.
    sixth = amax / number_like(E2M1[-1], amax)
    # The exponent's bits of a float32 are those of e8m0; a fraction that is not 0 carries into them.
    carried = (sixth.view(torch.int32) + ((1 << MANTISSA) - 1)) >> MANTISSA
    return torch.where(amax < torch.inf, carried, NOT_FINITE)


def _codes(scaled: Tensor) -> Tensor:
    """uint8 like `scaled` (float32, magnitudes up to 6): e2m1, whose steps are 0.5 below 2, 1 below 4, and 2."""
    size = scaled.abs()
    fine, middle, coarse = (size * 2).round_(), size.round() + 2, (size * 0.5).round_() + 4
    code = torch.where(size < 2, fine, torch.where(size < 4, middle, coarse))
    return code.nan_to_num_(nan=0.0).to(torch.uint8) + scaled.signbit().to(torch.uint8) * 8


def dequantize_mxfp4(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dtype` `[rows, columns]`: the float32 product of each code's value and its run's scale, then cast.

    The bits are those of transformers 5.23 (`integrations/mxfp4.py`, `convert_moe_packed_tensors`), except for runs of
    scale 255: they are NaN by the specification, and transformers takes 255 for 2^128.

    Args:
        codes: uint8 `[rows, columns / 2]`.
        scale: uint8 `[rows, columns / 32]`.
        dtype: of the result.

    Raises:
        ValueError: the columns are not a multiple of 32.
    """
    rows, columns = codes.shape[0], codes.shape[1] * 2
    check_columns(columns)
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    values, step = e2m1_values(codes.device), max(at_once(codes.device) // max(columns, 1), 1)
    for start in range(0, rows, step):
        packed, byte = codes[start : start + step], scale[start : start + step].to(torch.int32)
        power = torch.where(byte > 0, byte << MANTISSA, SMALLEST)
        power.masked_fill_(byte == NOT_FINITE, NAN)
        code = torch.stack((packed & 15, packed >> 4), dim=-1)
        decoded = values[code.int()].view(len(packed), -1, RUN) * power.view(torch.float32).unsqueeze(-1)
        out[start : start + step] = decoded.view(len(packed), columns)
    return out
