"""Integers of 2 to 8 bits on the grid between the smallest and the largest value of each group of a row's columns.

By the definition of GPTQModel (`gptqmodel/quantization/quantizer.py`, `Quantizer.find_params` and `quantize`, without
its `mse` search), in float32 whatever the weight's dtype. With `q = 2^bits - 1`:

    low, high = min(group, 0), max(group, 0)             both 0: -1 and 1
    symmetric:   high = max(-low, high); low = -high;    zero = (q + 1) / 2
    otherwise:                                           zero = round(-low / scale)
    scale = (high - low) / q;   code = clamp(round(x / scale) + zero, 0, q)

`round` is half to even. Codes are computed under the float32 scale, and the scale is stored rounded to float16, as
upstream's packing does. One difference: in a symmetric group without a negative value upstream leaves `low` at 0, and
clips the larger half of the group; here it is `-high`.

AutoAWQ's grid (`awq/quantize/quantizer.py`, `pseudo_quantize_tensor`) is the asymmetric one with the group's range not
below 1e-5 in place of the rule for zeros. Upstream computes it in float16, and does not put 0 into the range, so that
the zero point of a group of one sign is clamped and its values are clipped; here it is in float32 and with 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distquant.kernels.numbers import number_like
from distquant.kernels.reference.tiles import at_once


@dataclass(frozen=True, slots=True)
class Grid:
    """The rule by which a group becomes integers.

    Attributes:
        bits: of a code.
        symmetric: True if the range is symmetric about zero.
        minimum_range: the smallest range of a group; None = a group of zeros has the range -1 to 1.
    """

    bits: int
    symmetric: bool
    minimum_range: float | None = None


def rows_at_once(columns: int, device: torch.device, multiple: int = 1) -> int:
    """Rows to quantize at a time on `device` so that temporaries stay small: a multiple of `multiple`."""
    return max(at_once(device) // max(columns, 1) // multiple, 1) * multiple


def quantize_rtn(rows: Tensor, group_size: int, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[n, columns]`, scales float16 and zero points uint8 `[n, ceil(columns / group_size)]`.

    Args:
        rows: bfloat16, float16 or float32 `[n, columns]`.
        group_size: columns of a group; the last may have fewer.
        grid: the rounding rule.

    A code or zero point that would be NaN (a NaN or an infinity in the group) is 0; the group's scale is NaN or
    infinite.
    """
    n, columns = rows.shape
    full = columns // group_size * group_size
    codes = torch.empty((n, columns), dtype=torch.uint8, device=rows.device)
    scales, zeros = [], []
    for start, stop, size in ((0, full, group_size), (full, columns, columns - full)):
        if start == stop:
            continue
        grouped = rows[:, start:stop].unflatten(1, (-1, size))
        scale, zero = _parameters(grouped, grid)
        exact = torch.div(grouped, scale.unsqueeze(-1))
        exact.round_().add_(zero.unsqueeze(-1)).clamp_(0, 2**grid.bits - 1).nan_to_num_(nan=0.0)
        codes[:, start:stop].unflatten(1, (-1, size)).copy_(exact)
        scales.append(scale.to(torch.float16))
        zeros.append(zero.to(torch.uint8))
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1)


def _parameters(grouped: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point, both float32 `[n, groups]`, of `[n, groups, size]`."""
    low, high = grouped.amin(-1).float().clamp_(max=0), grouped.amax(-1).float().clamp_(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if grid.minimum_range is None:
        empty = high == low
        low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    extent = high - low if grid.minimum_range is None else (high - low).clamp_(min=grid.minimum_range)
    top = 2**grid.bits - 1
    # A tensor: torch on CUDA multiplies by the reciprocal of a plain number.
    scale = extent / number_like(float(top), extent)
    if grid.symmetric:
        return scale, torch.full_like(scale, (top + 1) / 2)
    return scale, (-low / scale).round_().clamp_(0, top).nan_to_num_(nan=0.0)
