"""Host memory for finished weights: fresh pages are most of the cost of filling it, so ask for large ones."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE = 4 << 20
"""Bytes from which a tensor is worth large pages."""

_HUGEPAGE = 14
"""MADV_HUGEPAGE of Linux' <asm-generic/mman-common.h>."""


@cache
def _madvise() -> Any:
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.empty`, in large pages where it lies on the host and is large. The pages are only advice: no error."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= LARGE and _madvise() is not None:
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(start, length, _HUGEPAGE)
    return tensor
