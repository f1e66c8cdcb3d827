"""Outputs that a caller may pass, so that a kernel writes its result into place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prepared(given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the tensor to write into: a view of `given` with `shape`, or a new one.

    Raises:
        ValueError: `given` has another dtype, device or number of elements, or is not contiguous.
    """
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if given.dtype is not dtype or given.numel() != math.prod(shape) or given.device != device:
        description = f"{given.dtype} {list(given.shape)} on {given.device}"
        raise ValueError(f"the output is {description}, the result is {dtype} {list(shape)} on {device}")
    if not given.is_contiguous():
        raise ValueError(f"the output of shape {list(given.shape)} is not contiguous: strides {given.stride()}")
    return given.view(shape)
