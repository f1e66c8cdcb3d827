"""NF4 and FP4: definitions in `distquant.kernels.reference.four_bit`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import magnitude, narrowed, reciprocal, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, on, power, words
from distquant.kernels.outputs import prepared
from distquant.kernels.reference import four_bit as truth

TINY = tl.constexpr(truth.TINY)
PER_PROGRAM = 4096
"""Elements that one program takes at once."""


@triton.jit
def _above(x, bound):
    """True where `x` is above `bound`, and for a NaN."""
    return (x <= bound) == 0  # not `x > bound`, which is false for a NaN


@triton.jit
def _rank(x, bounds):
    """int32: the number of the 15 ascending bounds below `x`, by four comparisons (a binary search)."""
    first = _above(x, tl.load(bounds + 7))
    bound = tl.where(first, tl.load(bounds + 11), tl.load(bounds + 3))
    second = _above(x, bound)
    high = tl.where(second, tl.load(bounds + 13), tl.load(bounds + 9))
    low = tl.where(second, tl.load(bounds + 5), tl.load(bounds + 1))
    third = _above(x, tl.where(first, high, low))
    high_high = tl.where(third, tl.load(bounds + 14), tl.load(bounds + 12))
    high_low = tl.where(third, tl.load(bounds + 10), tl.load(bounds + 8))
    low_high = tl.where(third, tl.load(bounds + 6), tl.load(bounds + 4))
    low_low = tl.where(third, tl.load(bounds + 2), tl.load(bounds + 0))
    bound = tl.where(first, tl.where(second, high_high, high_low), tl.where(second, low_high, low_low))
    last = _above(x, bound)
    return (first.to(tl.int32) << 3) | (second.to(tl.int32) << 2) | (third.to(tl.int32) << 1) | last.to(tl.int32)


@triton.jit(do_not_specialize=["count", "blocks"])
def _encode(weight, absmax, codes, bounds, order, count, blocks, SIZE: tl.constexpr, PER: tl.constexpr,
            GIVEN: tl.constexpr, RAGGED: tl.constexpr, RANKED: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """`PER` blocks of `SIZE` elements; `order` holds the code of each rank, four bits each, unless `RANKED`."""
    program = tl.program_id(0).to(tl.int64)
    block = program * PER + tl.arange(0, PER)
    offsets = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = widened(tl.load(weight + offsets, mask=offsets < count, other=0), KIND)
    if GIVEN:
        largest = tl.load(absmax + block, mask=block < blocks, other=1.0)
    else:
        largest = tl.max(magnitude(x), axis=1).to(tl.float32, bitcast=True)
        if RAGGED:
            largest = tl.where(largest < TINY, TINY, largest)
        tl.store(absmax + block, largest, mask=block < blocks)
    if RAGGED:
        scaled = tl.div_rn(x, tl.broadcast_to(largest[:, None], (PER, SIZE)))
    else:
        scaled = x * reciprocal(tl.where(largest < TINY, TINY, largest))[:, None]
    code = _rank(scaled, bounds)
    if not RANKED:
        code = ((order >> (code * 4).to(tl.int64)) & 15).to(tl.int32)
    even, odd = tl.split(tl.reshape(code, (PER * SIZE // 2, 2)))
    byte = program * (PER * SIZE // 2) + tl.arange(0, PER * SIZE // 2)
    tl.store(codes + byte, ((even << 4) | odd).to(tl.uint8), mask=byte < count // 2)


@cache
def _decisions(quant_type: str, device: torch.device) -> tuple[Tensor, int]:
    """float32 `[15]` thresholds on the device, and the code of each rank, four bits each."""
    bounds, _, _ = truth._tables(quant_type, torch.device("cpu"))
    order = range(16) if quant_type == "nf4" else truth.FP4_ASCENDING
    packed = sum(code << 4 * rank for rank, code in enumerate(order))
    return torch.tensor(bounds, dtype=torch.float32, device=device), packed


def _check(flat: Tensor, blocksize: int) -> None:
    if flat.numel() % 2:
        raise ValueError(f"{flat.numel()} codes do not fill whole bytes")
    if blocksize < 2 or blocksize != power(blocksize):
        raise ValueError(f"blocksize {blocksize}: GPU kernels take powers of two")


def _run(flat: Tensor, absmax: Tensor, codes: Tensor, blocksize: int, quant_type: str, tail: int, given: bool) -> None:
    """Encodes the full blocks up to `tail`, and the ragged block that starts there, if any."""
    bounds, order = _decisions(quant_type, flat.device)
    per = max((PER_PROGRAM // 2 if given else PER_PROGRAM) // blocksize, 1)  # a given absmax is loaded by each thread
    full = tail // blocksize
    parts = [(slice(0, tail), slice(0, full), False, per), (slice(tail, None), slice(full, None), True, 1)]
    with on(flat):
        for elements, blocks, ragged, together in parts:
            weight, largest = words(flat[elements]), absmax[blocks]
            if weight.numel():
                _encode[(-(-len(largest) // together),)](
                    weight, largest, codes[elements.start // 2 :], bounds, order, weight.numel(), len(largest),
                    SIZE=blocksize, PER=together, GIVEN=given, RAGGED=ragged, RANKED=quant_type == "nf4",
                    KIND=TRITON_DTYPES[flat.dtype], **EXACT,
                )  # fmt: skip


def encode_4bit(
    weight: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    ragged: bool = False,
    *,
    codes: Tensor | None = None,
) -> Tensor:
    """Equal to the reference's. Raises ValueError also if `blocksize` is not a power of two."""
    flat = weight.reshape(-1)
    _check(flat, blocksize)
    packed = prepared(codes, (flat.numel() // 2,), torch.uint8, flat.device)
    has_tail = ragged or flat.numel() % blocksize
    tail = (flat.numel() - 1) // blocksize * blocksize if has_tail else flat.numel()
    _run(flat, absmax.contiguous(), packed, blocksize, quant_type, tail, True)
    return packed


def quantize_4bit(
    weight: Tensor,
    blocksize: int,
    quant_type: str,
    *,
    codes: Tensor | None = None,
    absmax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's. Raises ValueError also if `blocksize` is not a power of two."""
    flat = weight.reshape(-1)
    _check(flat, blocksize)
    packed = prepared(codes, (flat.numel() // 2,), torch.uint8, flat.device)
    absmax = prepared(absmax, (-(-flat.numel() // blocksize),), torch.float32, flat.device)
    _run(flat, absmax, packed, blocksize, quant_type, flat.numel() // blocksize * blocksize, False)
    return packed, absmax


@triton.jit(do_not_specialize=["count"])
def _decode(codes, absmax, values, out, count, blocksize, PER: tl.constexpr, KIND: tl.constexpr):
    """`PER` bytes: two elements each."""
    byte = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    packed = tl.load(codes + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    code = tl.interleave(packed >> 4, packed & 15)
    offsets = tl.program_id(0).to(tl.int64) * (PER * 2) + tl.arange(0, PER * 2)
    scale = tl.load(absmax + offsets // blocksize, mask=offsets < count, other=0.0)
    decoded = tl.load(values + code) * scale
    tl.store(out + offsets, narrowed(decoded, KIND), mask=offsets < count)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Equal to the reference's."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    packed = codes.reshape(-1)
    values = truth.code_values(quant_type, codes.device)
    per = PER_PROGRAM // 2
    with on(packed):
        if out.numel():
            _decode[(-(-out.numel() // (2 * per)),)](
                packed,
                absmax.contiguous(),
                values,
                words(out),
                out.numel(),
                blocksize,
                PER=per,
                KIND=TRITON_DTYPES[dtype],
                **EXACT,
            )
    return out
