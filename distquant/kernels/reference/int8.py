"""int8 rows as LLM.int8 stores them (bitsandbytes 0.50, `backends/default/ops.py`, `int8_vectorwise_quant`).

The weight passes through float16 first. The factor of a row is `reciprocal(absmax) * 127`, two roundings, for so torch
computes a number divided by a tensor. Codes are the product with that factor, rounded half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.kernels.outputs import prepared
from distquant.kernels.reference.four_bit import TILE


def row_absmax(weight: Tensor, *, absmax: Tensor | None = None) -> Tensor:
    """float32 `[rows]`: largest magnitude of each row after the cast to float16; NaN where the row has a NaN."""
    found = prepared(absmax, (len(weight),), torch.float32, weight.device)
    return found.copy_(weight.to(torch.float16).abs().amax(dim=1))


def encode_int8_rows(weight: Tensor, absmax: Tensor, out: Tensor | None = None) -> Tensor:
    """int8 `[rows, columns]`: codes of `weight` (`[rows, columns]`, float) under given row absmax (float32 `[rows]`).

    No row's absmax may be less than its own largest float16 magnitude. Where the product is NaN (a NaN, a row of zeros,
    an infinity) the code is 0.
    """
    codes = prepared(out, tuple(weight.shape), torch.int8, weight.device)
    factor = (absmax.reciprocal() * 127.0).unsqueeze(-1)
    per_tile = max(TILE // max(weight.shape[1], 1), 1)
    for at in range(0, len(weight), per_tile):
        tile = weight[at : at + per_tile].to(torch.float16) * factor[at : at + per_tile]
        codes[at : at + per_tile] = tile.round_().nan_to_num_(nan=0.0)
    return codes


def quantize_int8_rows(
    weight: Tensor, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (int8 `[rows, columns]`) and absmax (float32 `[rows]`) of `weight`; written into those given."""
    found = row_absmax(weight, absmax=absmax)
    return encode_int8_rows(weight, found, codes), found
