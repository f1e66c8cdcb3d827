"""int8 rows as LLM.int8 stores them (bitsandbytes 0.50, `backends/default/ops.py`, `int8_vectorwise_quant`).

The weight is cast to float16 first. The factor of a row is `reciprocal(absmax) * 127`, with two roundings, because
torch computes a number divided by a tensor this way. Codes are the product with that factor, rounded half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.kernels.outputs import prepared
from distquant.kernels.reference.tiles import at_once


def row_absmax(weight: Tensor, *, absmax: Tensor | None = None) -> Tensor:
    """float32 `[rows]`: largest magnitude of each row after the cast to float16; NaN where the row has a NaN."""
    absmax = prepared(absmax, (len(weight),), torch.float32, weight.device)
    return absmax.copy_(weight.to(torch.float16).abs().amax(dim=1))


def encode_int8_rows(weight: Tensor, absmax: Tensor, out: Tensor | None = None) -> Tensor:
    """int8 `[rows, columns]`: codes of `weight` (`[rows, columns]`, float) under given row absmax (float32 `[rows]`).

    The absmax of a row must be at least its largest float16 magnitude. If the product is NaN (a NaN, a row of zeros, an
    infinity), the code is 0.
    """
    codes = prepared(out, tuple(weight.shape), torch.int8, weight.device)
    factor = (absmax.reciprocal() * 127.0).unsqueeze(-1)
    per_tile = max(at_once(weight.device) // max(weight.shape[1], 1), 1)
    for start in range(0, len(weight), per_tile):
        tile = weight[start : start + per_tile].to(torch.float16) * factor[start : start + per_tile]
        codes[start : start + per_tile] = tile.round_().nan_to_num_(nan=0.0)
    return codes


def quantize_int8_rows(
    weight: Tensor, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (int8 `[rows, columns]`) and absmax (float32 `[rows]`) of `weight`; written into those given."""
    absmax = row_absmax(weight, absmax=absmax)
    return encode_int8_rows(weight, absmax, codes), absmax
