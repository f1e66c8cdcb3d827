"""Kernels that call bitsandbytes, to compare its results with ours.

On the CPU they are equal to the reference's. On CUDA bitsandbytes decides FP4 by other constants near the thresholds,
and second-level codes by another search. A function that it lacks raises ValueError: its method needs other kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from bitsandbytes import functional
from torch import Tensor

from distquant.kernels.outputs import prepared
from distquant.kernels.reference import (
    block_absmax,
    block_amax,
    blockwise_absmax,
    code_values,
    row_absmax,
    unpack_4bit,
)
from distquant.process_state import changing_process_state

__all__ = [
    "block_absmax",
    "block_amax",
    "blockwise_absmax",
    "code_values",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp8",
    "dequantize_groups",
    "dequantize_mxfp4",
    "encode_4bit",
    "encode_fp8",
    "encode_int8_rows",
    "encode_scaled_rows",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp8",
    "quantize_fp8_rows",
    "quantize_fp8_ue8m0",
    "quantize_groups",
    "quantize_int8_rows",
    "quantize_mxfp4",
    "row_absmax",
    "unpack_4bit",
]


def quantize_4bit(
    weight: Tensor,
    blocksize: int,
    quant_type: str,
    *,
    codes: Tensor | None = None,
    absmax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[ceil(n / 2)]`) and absmax (float32 `[ceil(n / blocksize)]`) of the flat `weight`.

    Raises:
        ValueError: `n` is odd, an output does not fit, or bitsandbytes does not accept the blocksize or dtype.
    """
    count = weight.numel()
    if count % 2:
        raise ValueError(f"{count} codes do not fill whole bytes")
    packed = prepared(codes, (count // 2,), torch.uint8, weight.device)
    statistics = prepared(absmax, (-(-count // blocksize),), torch.float32, weight.device)
    theirs, state = functional.quantize_4bit(weight.contiguous(), blocksize=blocksize, quant_type=quant_type)
    return packed.copy_(theirs.view(-1)), statistics.copy_(state.absmax)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dtype` of `shape`, by the flat definition: bitsandbytes is given rows of whole blocks, one after the other.

    Args:
        codes: uint8 of at least `ceil(n / 2)` elements, any shape.
        absmax: float32 `[ceil(n / blocksize)]`.
    """
    count, blocks = math.prod(shape), len(absmax)
    # Its kernel for the CPU is wrong where a row ends within a block, so rows are made of whole blocks.
    packed = codes.new_zeros(blocks * blocksize // 2)
    packed[: (count + 1) // 2] = codes.view(-1)[: (count + 1) // 2]
    state = functional.QuantState(
        absmax,
        shape=torch.Size((blocks, blocksize)),
        code=code_values(quant_type, codes.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
    )
    # By itself it compiles its fallback for large blocks.
    with changing_process_state(), torch.compiler.set_stance("force_eager"):
        values = functional.dequantize_4bit(packed.view(-1, 1), state).view(-1)
    if quant_type == "fp4":  # without AVX-512 its code 8, the second zero, comes out as -0.0
        values = torch.where(unpack_4bit(packed) == 8, values.abs(), values)
    return values[:count].view(shape)


def quantize_blockwise(
    values: Tensor, code: Tensor, blocksize: int, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (uint8 `[n]`) and absmax (float32 `[ceil(n / blocksize)]`) of the flat `values`, under `code` `[256]`."""
    flat = values.reshape(-1).float().contiguous()
    theirs, state = functional.quantize_blockwise(flat, code=code, blocksize=blocksize)
    packed = prepared(codes, (flat.numel(),), torch.uint8, flat.device)
    statistics = prepared(absmax, (-(-flat.numel() // blocksize),), torch.float32, flat.device)
    return packed.copy_(theirs), statistics.copy_(state.absmax)


def dequantize_blockwise(codes: Tensor, absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """float32 `[n]`: `code[codes] * absmax`, with one absmax per `blocksize` codes."""
    return functional.dequantize_blockwise(codes.contiguous(), absmax=absmax, code=code, blocksize=blocksize)


def quantize_int8_rows(
    weight: Tensor, *, codes: Tensor | None = None, absmax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (int8 `[rows, columns]`) and absmax (float32 `[rows]`) of `weight` (`[rows, columns]`)."""
    theirs, their_absmax, _ = functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    packed = prepared(codes, tuple(weight.shape), torch.int8, weight.device)
    statistics = prepared(absmax, (len(weight),), torch.float32, weight.device)
    return packed.copy_(theirs), statistics.copy_(their_absmax)


def _absent(name: str) -> Callable[..., NoReturn]:
    def absent(*_: object, **__: object) -> NoReturn:
        raise ValueError(f"bitsandbytes has no {name}: use kernel 'auto', 'cpu', 'triton' or 'reference'")

    return absent


encode_4bit = _absent("encode_4bit")
encode_int8_rows = _absent("encode_int8_rows")
encode_scaled_rows = _absent("encode_scaled_rows")
encode_fp8 = _absent("encode_fp8")
quantize_fp8 = _absent("quantize_fp8")
quantize_fp8_rows = _absent("quantize_fp8_rows")
quantize_fp8_ue8m0 = _absent("quantize_fp8_ue8m0")
dequantize_fp8 = _absent("dequantize_fp8")
quantize_groups = _absent("quantize_groups")
dequantize_groups = _absent("dequantize_groups")
quantize_mxfp4 = _absent("quantize_mxfp4")
dequantize_mxfp4 = _absent("dequantize_mxfp4")
