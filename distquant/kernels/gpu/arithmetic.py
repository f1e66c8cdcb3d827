"""Arithmetic that must be the same on every GPU and in the interpreter."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

HALF_EVEN = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 has steps of one there, so that adding it rounds to integers, half to even."""


@triton.jit
def magnitude(x):
    """int32: bits of `|x|` (float32), which order like the magnitudes; every NaN is above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def reciprocal(x):
    """float32 `1 / x`, correctly rounded."""
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def rounded(x):
    """int32: `x` (float32, magnitude below 2^22) rounded half to even; 0 for a NaN."""
    return tl.where(x == x, (x + HALF_EVEN) - HALF_EVEN, 0.0).to(tl.int32)


@triton.jit
def clamped(x, low, high):
    """`x` between `low` and `high`; a NaN stays a NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def bfloat16_bits(x):
    """float32 `x` rounded to bfloat16, as int32 of the upper half: 0x7FC0 for a NaN."""
    bits = x.to(tl.int32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, even, 0x7FC0) & 0xFFFF


@triton.jit
def rounded_to(x, KIND: tl.constexpr):
    """float32: `x` (float32) rounded to the dtype `KIND`."""
    if tl.bfloat16 == KIND:
        return (bfloat16_bits(x) << 16).to(tl.float32, bitcast=True)
    elif tl.float16 == KIND:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def widened(x, KIND: tl.constexpr):
    """float32 of elements loaded from a tensor of dtype `KIND`; bfloat16 is loaded as int16 words."""
    if tl.bfloat16 == KIND:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, KIND: tl.constexpr):
    """float32 `x` as stored in a tensor of dtype `KIND`: bfloat16 as int16 words."""
    if tl.bfloat16 == KIND:
        return bfloat16_bits(x).to(tl.int16)
    else:
        return x.to(KIND)


@triton.jit
def e4m3(x):
    """uint8: bits of `x` (float32 in [-448, 448]) rounded half to even to float8_e4m3fn; 0x7F for a NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # From 2^-6 on: drop 20 bits of the mantissa and rebias the exponent from 127 to 7. Below: steps of 2^-9.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    small = rounded(size.to(tl.float32, bitcast=True) * 512.0 * tl.where(size < 0x3C800000, 1.0, 0.0))
    code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x == x, code, 0x7F).to(tl.uint8)
