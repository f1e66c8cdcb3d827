"""Codes of rows under given scales: the part that torchao, optimum-quanto and FBGEMM share.

Each method chooses its scales itself, which is little work. The rounding of a quotient before it becomes a code differs
as well; two options select it:

    inverse     the weight is multiplied by the float32 reciprocal of the scale: two roundings, not one division
    rounded     the quotient is rounded to the weight's dtype first, as arithmetic in that dtype does
"""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.kernels.outputs import prepared
from distquant.kernels.reference.tiles import at_once

E4M3_NAN = 0x7F
"""The one e4m3 NaN that is ever stored."""


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
    """`dtype` `[rows, columns]`: the quotients of `weight` and the scales of its rows.

    Args:
        weight: bfloat16, float16 or float32 `[rows, columns]`.
        scale: float32 `[rows]`.
        dtype: int8 or a float8 of torch.
        inverse, rounded: see above.
        low, high: bounds of int8 codes; those of float8 are its largest finite values.
        codes: written into where given.

    int8 is rounded half to even, and NaN is 0. A row whose scale is 0 has codes of 0, NaN or not.
    """
    packed = prepared(codes, tuple(weight.shape), dtype, weight.device)
    by, empty = scale.view(-1, 1), (scale == 0).view(-1, 1)
    integer = not dtype.is_floating_point
    top = 0.0 if integer else torch.finfo(dtype).max
    if inverse:
        by = by.reciprocal()
    step = max(at_once(weight.device) // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), step):
        tile = weight[start : start + step].float()
        value = tile * by[start : start + step] if inverse else tile / by[start : start + step]
        if rounded:
            value = value.to(weight.dtype).float()
        value = value.round_().clamp_(low, high).nan_to_num_(nan=0.0) if integer else value.clamp_(-top, top)
        packed[start : start + step] = value.masked_fill_(empty[start : start + step], 0.0).to(dtype)
    if dtype is torch.float8_e4m3fn:
        bits = packed.view(torch.uint8)
        bits.masked_fill_(bits == (E4M3_NAN | 0x80), E4M3_NAN)
    return packed
