"""Blocks of 8-bit codes into a table of 256 values: the second level of bitsandbytes' double quantization.

The definition is that of the native CPU library of bitsandbytes 0.50 on x86-64 (`csrc/cpu_ops.cpp`), which is what
`functional.quantize_blockwise` runs for float32 on CPU, and so what nested checkpoints hold. It does not search the
nearest value: it rounds `v = x * (1 / absmax)`, clamped to [-1, 1], to one of 65536 grid points, and stores the code
that is nearest to the grid point. The grid point's number is `trunc(fma((v + 1) * 0.5, 65535, 0.5))`, with one rounding
for product and sum. (Near the midpoints, the library's fallback in plain torch, its CUDA kernel and its ARM build give
other codes.) The ragged last block is like every other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from distquant.kernels.outputs import prepared

GRID = 65536
"""Points into which [-1, 1] is divided before a code is looked up."""


def blockwise_table(code: Tensor) -> Tensor:
    """uint8 `[65536]`: code of each grid point, under the ascending values `code` (float32 `[256]`).

    Point `i` has the value `2 i / 65535 - 1` in float32. Its code is the number of midpoints below it.
    """
    values = code.float().cpu()
    points = torch.arange(GRID, dtype=torch.float32) * 2 / torch.tensor(GRID - 1, dtype=torch.float32) - 1
    return torch.bucketize(points, (values[:-1] + values[1:]) * 0.5).to(torch.uint8).to(code.device)


_KNOWN = WeakTensorKeyDictionary()
"""Values of codes -> (how often they had been changed when their table was made, their table)."""


def blockwise_table_of(code: Tensor) -> Tensor:
    """Returns `blockwise_table(code)`, made once for each tensor of values while it lives and is not changed.

    A load asks for it once for each weight. To make it takes milliseconds, and a copy to the host and back that waits
    for the device.
    """
    if code.is_inference():  # torch does not count how often these are changed
        return blockwise_table(code)
    version, table = _KNOWN.get(code, (-1, None))
    if table is None or version != code._version:
        table = blockwise_table(code)
        _KNOWN[code] = code._version, table
    return table


def blockwise_absmax(values: Tensor, blocksize: int, *, absmax: Tensor | None = None) -> Tensor:
    """float32 `[ceil(n / blocksize)]`: largest magnitude of each block of the flat `values`, a NaN counting as 0."""
    flat = values.reshape(-1).float()
    count = flat.numel() // blocksize
    absmax = prepared(absmax, (-(-flat.numel() // blocksize),), torch.float32, flat.device)
    magnitude = flat.abs().nan_to_num_(nan=0.0, posinf=torch.inf)
    absmax[:count] = magnitude[: count * blocksize].view(-1, blocksize).amax(dim=1)
    if count < len(absmax):
        absmax[count] = magnitude[count * blocksize :].amax()
    return absmax


def quantize_blockwise(
    values: Tensor, code: Tensor, blocksize: int, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[n]`) and absmax (float32 `[ceil(n / blocksize)]`) of the flat `values`.

    Args:
        values: float, `n` elements of any shape.
        code: float32 `[256]`, ascending: the value of each code (bitsandbytes' `create_dynamic_map()`).
        blocksize: elements per absmax.
        codes, absmax: written into where given.

    A block of zeros gets code 0 everywhere. A NaN and an infinity get code 0; the finite elements beside an infinity
    get the code of 0.0. A zero gets code 0 in a block whose absmax has no finite reciprocal.
    """
    flat = values.reshape(-1).float()
    absmax = blockwise_absmax(flat, blocksize, absmax=absmax)
    inverse = absmax.reciprocal().repeat_interleave(blocksize)[: flat.numel()]
    scaled = (flat * inverse).clamp_(-1.0, 1.0)
    # The product has 40 bits and float64 holds it, so that the sum's rounding to float32 is the only one.
    point = (((scaled + 1.0) * 0.5).double() * (GRID - 1) + 0.5).float()
    point.nan_to_num_(nan=0.0)
    packed = prepared(codes, (flat.numel(),), torch.uint8, flat.device)
    return packed.copy_(blockwise_table_of(code)[point.int()]), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """float32 `[n]`: `code[codes] * absmax`, with one absmax per `blocksize` codes."""
    scale = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return code[codes.int()] * scale
