"""Host memory for finished weights: fresh pages are most of the cost of filling it, so ask for large ones."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

HUGE = 2 << 20
"""Bytes of a large page, and the alignment that lets the kernel use one."""

LARGE = 2 * HUGE
"""Bytes from which a tensor is worth large pages."""


def empty(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.empty`; on the host, a large tensor starts on a large page and asks for as many as fill it.

    Asking is advice, so there is nothing to fail. What does not fill a large page lies in small ones: no byte more is
    taken than the tensor has.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    area = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(area, dtype=torch.uint8).data_ptr() % HUGE
    area.madvise(mmap.MADV_HUGEPAGE, offset, nbytes // HUGE * HUGE)
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
