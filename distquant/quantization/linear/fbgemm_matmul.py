"""FBGEMM's product of float8 rows, `f8f8bf16_rowwise`: what transformers 5.23 multiplies `fbgemm_fp8` with on CUDA.

It is in the package `fbgemm-gpu-genai` (facts of version 1.8.0, with code for sm_80, sm_90a and sm_100a), built for
one release of torch. A library for another may end the process when it is loaded, so the versions are compared first.
Before it multiplies a model it is tried on a few rows: where it fails, or gives another product than the float8 numbers
have, torch's `scaled_mm` is taken, and the report says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from functools import cache

import torch
from packaging.version import Version
from torch import Tensor

from distquant.accelerator.facts import capability, reaches
from distquant.errors import one_line

PACKAGE = "fbgemm-gpu-genai"

MINORS_BEHIND_TORCH = 5
"""FBGEMM 1.n is for torch 2.(n + 5): the table in `fbgemm_gpu/__init__.py`, from 1.0 to 1.8."""

CAPABILITY = (9, 0)
"""Least CUDA compute capability: its kernels are CUTLASS' for Hopper and newer."""

TRIAL = (16, 128, 256)
"""Rows, outputs and inputs of the product that is tried."""

TOLERANCE = 0.01
"""Largest relative error of that product (Frobenius norm): its result is bfloat16, which has up to 0.004."""


@cache
def why_not(device: torch.device) -> str | None:
    """Reason why FBGEMM cannot multiply on a device; None where it can."""
    if capability(device) is None:
        return f"f8f8bf16_rowwise does not run on {device}"
    if not reaches(device, CAPABILITY):
        return f"f8f8bf16_rowwise needs compute capability {'.'.join(map(str, CAPABILITY))}"
    return _not_loaded() or tried(device)


@cache
def _not_loaded() -> str | None:
    """Reason why FBGEMM's operations are not there; None where they are."""
    try:
        version = Version(importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} is not installed"
    present = Version(torch.__version__)
    if version.major != 1 or (present.major, present.minor) != (2, version.minor + MINORS_BEHIND_TORCH):
        return f"{PACKAGE} {version} is not for torch {present.public}"
    try:
        importlib.import_module("fbgemm_gpu.experimental.gen_ai")
    except (ImportError, OSError) as error:  # OSError: the library itself, or one that it needs
        return f"{PACKAGE} cannot be loaded ({one_line(error)})"
    return None


def tried(device: torch.device) -> str | None:
    """Reason why the product of a few rows is not that of their float8 numbers; None where it is."""
    rows, outputs, inputs = TRIAL
    noise = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, inputs, generator=noise).to(torch.float8_e4m3fn) for n in (rows, outputs))
    scales = [torch.rand(n, generator=noise) + 0.5 for n in (rows, outputs)]
    expected = (x.float() * scales[0].view(-1, 1)) @ (weight.float() * scales[1].view(-1, 1)).t()
    try:
        found = rows_product(*(value.to(device) for value in (x, scales[0], weight, scales[1]))).float().cpu()
    except (RuntimeError, AttributeError) as error:  # of the operation; it is not there
        return f"f8f8bf16_rowwise fails ({one_line(error)})"
    distance = float((found - expected).norm() / expected.norm())
    return None if distance < TOLERANCE else f"f8f8bf16_rowwise is wrong by {distance:.2g} on {device}"


def rows_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """bfloat16 `[rows, out]`: the product of float8 numbers.

    Args:
        x: float8_e4m3fn `[rows, in]`.
        x_scale: float32 `[rows]`.
        weight: float8_e4m3fn `[out, in]`.
        scale: float32 `[out]`.
    """
    product: Tensor = torch.ops.fbgemm.f8f8bf16_rowwise(x, weight, x_scale, scale)
    return product
