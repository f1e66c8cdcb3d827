"""Launches of kernels: device, options, and views of tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from distquant.accelerator.names import runs_cuda_kernels

EXACT: dict[str, Any] = {"enable_fp_fusion": False}
"""Options of every launch: a product and a sum keep their two roundings."""

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Triton's names for the dtypes of weights."""


def on(weight: Tensor) -> AbstractContextManager[Any]:
    """Returns the context for launching kernels over `weight`, in which its device is the current one.

    Raises:
        ValueError: it is not on a GPU, or has a dtype that no kernel reads.
    """
    if weight.dtype not in TRITON_DTYPES and weight.dtype not in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"a tensor of {weight.dtype}: GPU kernels read bfloat16, float16 and float32")
    if runs_cuda_kernels(weight.device):
        return torch.accelerator.device_index(weight.device.index)
    if knobs.runtime.interpret:
        return nullcontext()
    raise ValueError(f"a tensor on {weight.device}: GPU kernels need one on a GPU, or TRITON_INTERPRET=1")


def by_rows(weight: Tensor) -> Tensor:
    """Returns `weight` (`[rows, columns]`) with contiguous rows; gaps between rows, as in a slice, are allowed."""
    return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()


def words(tensor: Tensor) -> Tensor:
    """Returns the view that kernels take: bfloat16 as int16, because the interpreter's bfloat16 is inexact."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


def power(count: int) -> int:
    """Returns the smallest power of two that is not less than `count`."""
    return 1 << max(count - 1, 0).bit_length()
