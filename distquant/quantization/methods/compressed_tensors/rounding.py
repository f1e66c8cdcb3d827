"""Rounding to nearest as in compressed-tensors, where there is no kernel for it; and codes in int32 words.

By the definition of compressed-tensors 0.20: `calculate_qparams` (`quantization/utils/helpers.py`), `_quantize`
(`quantization/lifecycle/forward_helpers.py`) and `pack_to_int32` (`compressors/pack_quantized/helpers.py`). Every
operation is in the weight's own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distquant.config import QuantizationArgs
from distquant.kernels.numbers import number_like
from distquant.quantization.algorithms.bit_packing import pack_bytes, unpack_words
from distquant.quantization.methods.compressed_tensors.storage import WORD
from distquant.sharding.layout import ALL

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def ranges(weight: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each tile, not above and not below 0: `[ceil(rows / r), ceil(columns / c)]`."""
    rows, columns = weight.shape
    height, width = (size if side == ALL else side for side, size in zip(tile, weight.shape, strict=True))
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return tiles.amin((1, 3)).clamp_(max=0), tiles.amax((1, 3)).clamp_(min=0)


def scales_of(low: Tensor, high: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor | None]:
    """Scales (the dtype of `low` and `high`), and zero points (int8) unless symmetric, of tiles of that range."""
    top = FP8_MAX if args.type == "float" else 2.0 ** (args.num_bits - 1)
    extent = 2 * top if args.type == "float" else 2 * top - 1
    steps = number_like(extent, low)  # torch on CUDA multiplies by 1 / plain number
    if args.symmetric:
        scale, zero = torch.maximum(low.abs(), high) / (steps / 2), None
    else:
        scale = (high - low) / steps
        zero = (-top - low / scale).clamp_(-top, top - 1).round_().nan_to_num_(nan=0.0).to(torch.int8)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale), zero


def quantized(
    weight: Tensor, scale: Tensor, zero: Tensor | None, tile: tuple[int, int], args: QuantizationArgs
) -> Tensor:
    """Codes, int8 or float8_e4m3fn of the weight's shape, under given scales and zero points of its tiles."""
    scaled = weight / spread(scale, tile, weight.shape)
    scaled += 0 if zero is None else spread(zero, tile, weight.shape).to(weight.dtype)
    if args.type == "float":
        return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    top = 2 ** (args.num_bits - 1)
    return scaled.clamp_(-top, top - 1).round_().nan_to_num_(nan=0.0).to(torch.int8)


def spread(values: Tensor, tile: tuple[int, int], shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Values of tiles, so that they broadcast over a matrix of `shape`."""
    for dim, side in enumerate(tile):
        if side not in (ALL, 1):
            values = values.repeat_interleave(side, dim)[(slice(None),) * dim + (slice(shape[dim]),)]
    return values


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int8 `[n, count]` in `[-2^(bits - 1), 2^(bits - 1))`, from int32 `[n, ceil(count * bits / 32)]`."""
    if WORD % bits == 0:
        values = unpack_words(words, bits, 1, torch.int32)[:, :count]
    else:
        first = torch.arange(count, device=words.device) * bits
        wide = torch.nn.functional.pad(words.to(torch.int64) & ((1 << WORD) - 1), (0, 1))
        word, shift = first // WORD, first % WORD
        values = (wide[:, word] >> shift | wide[:, word + 1] << (WORD - shift)) & ((1 << bits) - 1)
    return (values - (1 << bits - 1)).to(torch.int8)


def to_words(values: Tensor, bits: int) -> Tensor:
    """The inverse, for int8 values of 4 and 8 bits; what is left of the last word is 0."""
    shifted = values.view(torch.uint8) + (1 << bits - 1)
    padded = torch.nn.functional.pad(shifted, (0, -values.shape[1] % (WORD // bits)))
    return pack_bytes(padded, bits).reshape(-1).view(torch.int32).view(len(values), -1)
