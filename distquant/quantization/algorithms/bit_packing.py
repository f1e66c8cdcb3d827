"""Unsigned values of 2, 3, 4 or 8 bits in int32 words, the lowest bits first, packed along either dim of a matrix.

32 values of 3 bits fill three words and may straddle two of them; the others fill one word. This is the packing of
AutoGPTQ and GPTQModel (`nn_modules/qlinear/__init__.py`, `pack_original`) along both dims, and with another order of
the values in a word that of AutoAWQ (`awq/modules/linear/gemm.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32
"""Bits of a word."""


def pack_factor(bits: int) -> tuple[int, int]:
    """Values that are packed together, and the words they fill: (8, 1) of 4 bits, (32, 3) of 3 bits."""
    filled = math.lcm(bits, WORD)
    return filled // bits, filled // WORD


def unpack_words(
    words: Tensor, bits: int, dim: int, dtype: torch.dtype, order: tuple[int, ...] | None = None
) -> Tensor:
    """Values `dtype` from int32 words; `dim` grows by `32 / bits`.

    Args:
        words: `[rows, columns]`, whole runs of `pack_factor` along `dim`.
        bits: of a value.
        dim: along which values are packed, 0 or 1.
        dtype: of the result; it must hold `2^bits - 1`.
        order: `order[i]` is the value in slot `i` of a word, where that is not `i`.
    """
    per, number = pack_factor(bits)
    grouped = words.unflatten(dim, (-1, number))
    shape = (*grouped.shape[: dim + 1], per, *grouped.shape[dim + 2 :])
    values = torch.empty(shape, dtype=dtype, device=words.device)
    mask = (1 << bits) - 1
    for slot in range(per):
        word, offset = divmod(slot * bits, WORD)
        value = grouped.select(dim + 1, word) >> offset
        inside = WORD - offset
        if inside < bits:  # a value of 3 bits in two words: clear the sign bits that were shifted in, add the rest
            value &= (1 << inside) - 1
            value |= grouped.select(dim + 1, word + 1) << inside
        values.select(dim + 1, order[slot] if order else slot).copy_(value.bitwise_and_(mask))
    return values.flatten(dim, dim + 1)


def pack_words(values: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The inverse of `unpack_words`: int32 words from values in `[0, 2^bits)`, whole runs of them along `dim`."""
    per, number = pack_factor(bits)
    grouped = values.unflatten(dim, (-1, per))
    shape = (*grouped.shape[: dim + 1], number, *grouped.shape[dim + 2 :])
    words = torch.zeros(shape, dtype=torch.int32, device=values.device)
    for slot in range(per):
        word, offset = divmod(slot * bits, WORD)
        value = grouped.select(dim + 1, order[slot] if order else slot).to(torch.int32)
        words.select(dim + 1, word).bitwise_or_(value << offset)
        if WORD - offset < bits:
            words.select(dim + 1, word + 1).bitwise_or_(value >> (WORD - offset))
    return words.flatten(dim, dim + 1)


def pack_bytes(values: Tensor, bits: int) -> Tensor:
    """uint8 `[rows, columns * bits / 8]` from uint8 values of 2, 4 or 8 bits: four bytes are one word of a row.

    The bytes that become one are seen as one integer, so that values are read in order.
    """
    if bits == 8:
        return values
    wide = values.reshape(-1).view(torch.int16 if bits == 4 else torch.int32)
    # Value i is `8 * i` bits up and belongs `bits * i` up; the cast drops all above the lowest byte.
    packed = wide >> 8 - bits
    for slot in range(2, 8 // bits):
        packed |= wide >> slot * (8 - bits)
    return packed.bitwise_or_(wide).to(torch.uint8).view(len(values), -1)
