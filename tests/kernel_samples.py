"""What tests of several kernels share: inputs, and how results are compared."""

from __future__ import annotations

import math

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random(count: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """float32 as integers, so that -0.0 and NaN compare too; the payload of a NaN is left to the reduction's order."""
    return torch.where(tensor.isnan(), torch.tensor(math.nan), tensor).contiguous().view(torch.int32)


SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 6e-8, 65504.0, -0.5]
"""Values of which blocks are made that a mere random weight does not have."""


def specials(count: int, dtype: torch.dtype, seed: int, values: list[float] | None = None) -> torch.Tensor:
    """`count` elements drawn from `values` (`SPECIAL`)."""
    chosen = torch.tensor(SPECIAL if values is None else values)
    drawn = torch.randint(0, len(chosen), (count,), generator=torch.Generator().manual_seed(seed))
    return chosen[drawn].to(dtype)
