"""MXFP4: definitions in `distquant.kernels.reference.mxfp4`."""

# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distquant.kernels.gpu.arithmetic import magnitude, narrowed, rounded, widened
from distquant.kernels.gpu.launch import EXACT, TRITON_DTYPES, by_rows, on, words
from distquant.kernels.outputs import prepared
from distquant.kernels.reference import mxfp4 as truth

RUN = tl.constexpr(truth.RUN)
PER_PROGRAM = 128
"""Runs of one program."""


@triton.jit(do_not_specialize=["runs"])
def _encode(weight, codes, scale, runs, across, stride, PER: tl.constexpr, KIND: tl.constexpr):
    """`PER` runs, of which a row has `across`."""
    program = tl.program_id(0).to(tl.int64)
    run = program * PER + tl.arange(0, PER)
    offsets = (run // across * stride + run % across * RUN)[:, None] + tl.arange(0, RUN)[None, :]
    x = widened(tl.load(weight + offsets, mask=(run < runs)[:, None], other=0), KIND)
    largest = tl.max(magnitude(x), axis=1)
    sixth = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full((PER,), 6.0, tl.float32))
    finite = largest < 0x7F800000
    # A fraction that is not 0 carries into the exponent.
    byte = tl.where(finite, (sixth.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23, 255)
    tl.store(scale + run, byte.to(tl.uint8), mask=run < runs)
    inverse = (tl.where(finite, 254 - byte, 127) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(finite[:, None], x, 6.0) * inverse[:, None]
    size = tl.abs(scaled)
    coarse = tl.where(size < 4, rounded(size) + 2, rounded(size * 0.5) + 4)
    code = tl.where(size < 2, rounded(size * 2.0), coarse) | ((scaled.to(tl.int32, bitcast=True) >> 28) & 8)
    even, odd = tl.split(tl.reshape(code, (PER * RUN // 2, 2)))
    byte_at = program * (PER * RUN // 2) + tl.arange(0, PER * RUN // 2)
    tl.store(codes + byte_at, (even | (odd << 4)).to(tl.uint8), mask=byte_at < runs * (RUN // 2))


def quantize_mxfp4(
    weight: Tensor, *, codes: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference's."""
    rows, columns = weight.shape
    truth.check_columns(columns)
    packed = prepared(codes, (rows, columns // 2), torch.uint8, weight.device)
    stored = prepared(scale, (rows, columns // truth.RUN), torch.uint8, weight.device)
    source = by_rows(weight)
    with on(source):
        if source.numel():
            _encode[(-(-stored.numel() // PER_PROGRAM),)](
                words(source), packed, stored, stored.numel(), stored.shape[1], source.stride(0),
                PER=PER_PROGRAM, KIND=TRITON_DTYPES[weight.dtype], **EXACT,
            )  # fmt: skip
    return packed, stored


@triton.jit(do_not_specialize=["count"])
def _decode(codes, scale, values, out, count, PER: tl.constexpr, KIND: tl.constexpr):
    """`PER` bytes: two elements each."""
    byte = tl.program_id(0).to(tl.int64) * PER + tl.arange(0, PER)
    packed = tl.load(codes + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    code = tl.interleave(packed & 15, packed >> 4)
    offsets = tl.program_id(0).to(tl.int64) * (PER * 2) + tl.arange(0, PER * 2)
    power = tl.load(scale + offsets // RUN, mask=offsets < count, other=0).to(tl.int32)
    power = tl.where(power > 0, power << 23, 1 << 22)
    power = tl.where(power == 0x7F800000, 0x7FC00000, power).to(tl.float32, bitcast=True)
    tl.store(out + offsets, narrowed(tl.load(values + code) * power, KIND), mask=offsets < count)


def dequantize_mxfp4(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Equal to the reference's."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    truth.check_columns(columns)
    source = codes.contiguous()
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    with on(source):
        if out.numel():
            _decode[(-(-out.numel() // 4096),)](
                source, scale.contiguous(), truth.e2m1_values(codes.device), words(out), out.numel(),
                PER=2048, KIND=TRITON_DTYPES[dtype], **EXACT,
            )  # fmt: skip
    return out
