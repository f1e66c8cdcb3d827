"""NF4 and FP4 of flat blocks, two codes a byte.

Formats as bitsandbytes 0.50 defines them on CPU (`backends/default/ops.py`), so that packed codes and absmax equal what
`transformers` + bitsandbytes store. Every function works on flat runs of blocks.

Decision thresholds are the midpoints of neighbouring code values in float32, a value on a midpoint goes down; for FP4
too (bitsandbytes' Triton kernel decides FP4 by other constants; this is the one definition used here on all devices).
A NaN gets the highest code. The ragged last block is divided by its absmax, full blocks are multiplied by the
reciprocal: the two round differently, and bitsandbytes does the same.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from distquant.kernels.outputs import prepared
from distquant.kernels.reference.tiles import at_once

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
"""Normal-float values by code (QLoRA, arXiv 2305.14314, appendix E)."""

FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
       0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204,
       -0.25)  # fmt: skip
"""FP4 values by code, in bitsandbytes' order (sign bit first)."""

FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
"""FP4 codes by ascending value; of the two zeros, code 0 comes first."""

TINY = 1e-38
"""Smallest divisor: keeps a block of zeros from dividing by zero."""


@cache
def _tables(quant_type: str, device: torch.device) -> tuple[list[float], Tensor | None, Tensor]:
    """Thresholds in ascending order, rank -> code (None where they are the same), and code -> value."""
    values = torch.tensor(NF4 if quant_type == "nf4" else FP4, dtype=torch.float32)
    order = None if quant_type == "nf4" else torch.tensor(FP4_ASCENDING)
    ascending = values if order is None else values[order]
    bounds = ((ascending[:-1] + ascending[1:]) / 2).tolist()
    codes = None if order is None else order.to(device=device, dtype=torch.uint8)
    return bounds, codes, values.to(device)


def code_values(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 `[16]`: the value of each 4-bit code of `nf4` or `fp4`."""
    return _tables(quant_type, torch.device(device))[2]


def block_absmax(weight: Tensor, blocksize: int, *, absmax: Tensor | None = None) -> Tensor:
    """float32 `[ceil(n / blocksize)]`: largest magnitude of each block of the flat `weight`; NaN where it has a NaN.

    A ragged last block has at least `TINY`, a full block of zeros has 0.
    """
    flat = weight.reshape(-1)
    count = flat.numel() // blocksize
    absmax = prepared(absmax, (-(-flat.numel() // blocksize),), torch.float32, flat.device)
    absmax[:count] = flat[: count * blocksize].view(-1, blocksize).abs().amax(dim=1)
    if count < len(absmax):
        absmax[count] = flat[count * blocksize :].abs().amax().float().clamp(min=TINY)
    return absmax


def encode_4bit(
    weight: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    ragged: bool = False,
    *,
    codes: Tensor | None = None,
) -> Tensor:
    """uint8 `[ceil(n / 2)]`: codes of the flat `weight` under given absmax, even elements in the high nibble.

    Args:
        weight: any shape, float; `n` elements in row-major order.
        absmax: float32 `[ceil(n / blocksize)]`.
        blocksize: elements per absmax.
        quant_type: `nf4` or `fp4`.
        ragged: True if the last block belongs to the weight's ragged tail although it is full here. (The last block of
            a shard can be of full length inside the tail of the weight.)
        codes: uint8 of as many bytes, to write into.

    A NaN, and every element of a block whose absmax is NaN, gets the highest code; under an infinite absmax an infinite
    element does so too, and a finite one gets the code of 0.

    Raises:
        ValueError: `n` is odd, or `codes` does not fit.
    """
    flat = weight.reshape(-1)
    packed = prepared(codes, ((flat.numel() + 1) // 2,), torch.uint8, flat.device)
    tile = max(at_once(flat.device) // blocksize, 1) * blocksize
    # The tail is divided and not multiplied, so it is encoded apart from the full blocks, also where it is full here.
    tail = (flat.numel() - 1) // blocksize * blocksize if ragged or flat.numel() % blocksize else flat.numel()
    for start in range(0, tail, tile):
        stop = min(start + tile, tail)
        inverse = absmax[start // blocksize : stop // blocksize].clamp(min=TINY).reciprocal()
        scaled = flat[start:stop].view(-1, blocksize).float() * inverse.view(-1, 1)
        packed[start // 2 : stop // 2] = _pack(_codes(scaled.view(-1), quant_type))
    if tail < flat.numel():
        scaled = flat[tail:].float() / absmax[-1]
        packed[tail // 2 :] = _pack(_codes(scaled, quant_type))
    return packed


def quantize_4bit(
    weight: Tensor,
    blocksize: int,
    quant_type: str,
    *,
    codes: Tensor | None = None,
    absmax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[ceil(n / 2)]`) and absmax (float32 `[ceil(n / blocksize)]`) of the flat `weight`.

    `codes` and `absmax` are written into where given. Raises as `encode_4bit`.
    """
    absmax = block_absmax(weight, blocksize, absmax=absmax)
    return encode_4bit(weight, absmax, blocksize, quant_type, codes=codes), absmax


def _codes(scaled: Tensor, quant_type: str) -> Tensor:
    """uint8: the code with the nearest value, for each element."""
    # The rank of a value is the number of thresholds below it. Counting down from the highest rank by the thresholds
    # that are not below gives a NaN, for which every comparison is false, the highest code.
    bounds, codes, _ = _tables(quant_type, scaled.device)
    rank = torch.full(scaled.shape, len(bounds), dtype=torch.uint8, device=scaled.device)
    held = torch.empty(scaled.shape, dtype=torch.bool, device=scaled.device)
    for bound in bounds:
        torch.le(scaled, bound, out=held)
        rank.sub_(held.view(torch.uint8))
    return rank if codes is None else codes[rank.int()]


def _pack(codes: Tensor) -> Tensor:
    if codes.numel() % 2:
        # The padding element is the code of 0.0 in bitsandbytes' rank order: 7 for NF4, 0 for FP4.
        raise ValueError(f"{codes.numel()} codes do not fill whole bytes")
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack_4bit(packed: Tensor) -> Tensor:
    """uint8 `[2 n]`: one code an element from uint8 `[n]`, high nibble first."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).view(-1)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dtype` of `shape`: the float32 product of value and absmax, then cast.

    By the flat definition, also where blocks straddle rows (upstream's CPU kernel does not).

    Args:
        codes: uint8 of at least `ceil(n / 2)` elements, any shape.
        absmax: float32 `[ceil(n / blocksize)]`.
    """
    count = torch.Size(shape).numel()
    values = code_values(quant_type, codes.device)[unpack_4bit(codes.reshape(-1)).int()][:count]
    full = count // blocksize * blocksize
    values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize].view(-1, 1))
    if full < count:
        values[full:] *= absmax[-1]
    return values.view(shape).to(dtype)
