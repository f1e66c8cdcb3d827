"""Devices by name, as users, plans and other libraries spell them. Needs no torch: plans are made without a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CUDA = "cuda"
"""torch's type of NVIDIA's GPUs and, with ROCm, of AMD's."""

NUMBERED = (CUDA, "xpu", "npu")
"""Types that accelerate and transformers name by a number alone."""


def device_name(value: Any, device_type: str | None = None) -> str:
    """Returns the full name of a device, with its number.

    A number alone is one of the ranks' type, and of CUDA's if that is unknown or the CPU. A type alone, such as `cuda`,
    is its first device: a plan may be made where there is no current one.
    """
    if isinstance(value, int) or str(value).isdigit():
        return f"{CUDA if device_type in (None, 'cpu') else device_type}:{value}"
    return f"{value}:0" if str(value) in NUMBERED else str(value)


def device_number(name: str) -> int | str:
    """Returns the name that accelerate has for a device: a GPU's is its number."""
    kind, _, number = name.partition(":")
    return int(number) if kind in NUMBERED and number.isdigit() else name


def first_device(name: str) -> str:
    """Returns the name of a type's first device for `cuda` and `gpu`; other names as they are."""
    return f"{CUDA}:0" if name.lower() in (CUDA, "gpu") else name


def device_type(name: str) -> str:
    """Returns the type in a device's name, `cuda` of `cuda:1`."""
    return name.partition(":")[0]


def runs_cuda_kernels(device: torch.device) -> bool:
    """Returns True where kernels written for CUDA run: Triton's, bitsandbytes' and gptqmodel's."""
    return device.type == CUDA
