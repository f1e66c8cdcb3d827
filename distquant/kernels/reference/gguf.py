"""GGUF blocks as values, with torch alone: the arithmetic of `gguf/quants.py` (gguf 0.19), float32 throughout.

A block's bytes, in the order in which they are stored:

Q4_0 (32 values): d f16; 16 bytes, value `i` in the low and `i + 16` in the high nibble; `d * (q - 8)`.
Q5_0 (32): d f16; 4 bytes of fifth bits, value `i` in bit `i`; nibbles as Q4_0; `d * (q - 16)`.
Q8_0 (32): d f16; 32 int8; `d * q`.
Q4_K (256): d, dmin f16; 12 bytes of eight 6-bit scales and mins; 128 bytes, of each 32 the low nibbles are one run of
    32 values and the high ones the next; `d * scale * q - dmin * min` by runs of 32.
Q5_K (256): as Q4_K, with 32 bytes of fifth bits before the nibbles, run `r` in bit `r`.
Q6_K (256): 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d f16; `d * scale * (q - 32)` by runs of 16.
F32, F16, BF16: as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

K_BLOCK = 256


def dequantize_gguf(words: Tensor, kind: str, columns: int) -> Tensor:
    """float32 `[rows, columns]` from uint8 `[rows, bytes of a row]` of a type."""
    words = words.contiguous()
    if kind in _FLOATS:
        return words.view(_FLOATS[kind]).view(-1, columns).float()
    block, decode = _DECODERS[kind]
    blocks = words.view(-1, words.shape[1] * block // columns if columns else 1)
    return decode(blocks).view(-1, columns)


def _half(blocks: Tensor, offset: int) -> Tensor:
    """float32 `[blocks, 1]`: the float16 at a byte."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(words: Tensor, run: int) -> Tensor:
    """Values of runs of bytes: the low nibbles of a run, then its high ones; `[blocks, 2 * bytes]`."""
    runs = words.reshape(len(words), -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), 2).view(len(words), -1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q5_0(blocks: Tensor) -> Tensor:
    high = blocks[:, 2:6].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=blocks.device) & 1
    codes = _nibbles(blocks[:, 6:], 16) | high.flatten(1) << 4
    return _half(blocks, 0) * (codes.float() - 16)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """float32 `[blocks, 8]` each, from 12 bytes."""
    # Scales 0 to 3 are the low six bits of bytes 0 to 3, mins 0 to 3 those of bytes 4 to 7. Of scales and mins 4 to 7,
    # the low four bits are the nibbles of bytes 8 to 11, and the upper two are the top bits of bytes 0 to 7.
    first, second, third = packed.split(4, 1)
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), 1)
    mins = torch.cat((second & 63, third >> 4 | second >> 2 & 48), 1)
    return scales.float(), mins.float()


def _with_mins(blocks: Tensor, codes: Tensor) -> Tensor:
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scales, mins = _half(blocks, 0) * scales, _half(blocks, 2) * mins
    runs = codes.view(len(blocks), 8, 32).float()
    return (scales.unsqueeze(2) * runs - mins.unsqueeze(2)).view(len(blocks), K_BLOCK)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_mins(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    high = blocks[:, 16:48].unsqueeze(1) >> bits & 1
    return _with_mins(blocks, _nibbles(blocks[:, 48:], 32) | high.flatten(1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32) >> shifts & 3
    codes = (_nibbles(blocks[:, :128], 64) | high.flatten(1) << 4).float() - 32
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scales.unsqueeze(2) * codes.view(len(blocks), 16, 16)).view(len(blocks), K_BLOCK)


_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODERS = {
    "Q4_0": (32, _q4_0), "Q5_0": (32, _q5_0), "Q8_0": (32, _q8_0),
    "Q4_K": (K_BLOCK, _q4_k), "Q5_K": (K_BLOCK, _q5_k), "Q6_K": (K_BLOCK, _q6_k),
}  # fmt: skip
"""By type: values of a block, and what makes them from bytes `[blocks, bytes]`."""

HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""By type: the bytes of a block at which it has a float16 that multiplies its values."""
