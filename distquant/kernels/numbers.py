"""Numbers as tensors on a device."""

from __future__ import annotations

import torch
from torch import Tensor


def number_like(value: float, like: Tensor) -> Tensor:
    """Returns a number as a tensor without dims, of the dtype and on the device of another.

    Torch on CUDA divides by a plain number by multiplying by its reciprocal, which gives other bits. A device
    fills this tensor itself; `torch.tensor` would copy it from memory that is not pinned, and the host would wait.
    """
    return torch.full((), value, dtype=like.dtype, device=like.device)
