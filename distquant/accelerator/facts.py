"""Facts about the devices of this process. Each is None where the backend does not tell it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distquant.accelerator.names import runs_cuda_kernels

CPU = torch.device("cpu")


def own_device() -> torch.device:
    """Returns the current device of this process' accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return CPU
    return resolved(torch.accelerator.current_accelerator() or CPU)


def resolved(device: torch.device | str) -> torch.device:
    """Returns the device with its number: without one, the accelerator's current device is meant.

    Tensors always have a number, so `cuda` and `cuda:0` would else be two keys for one device.
    """
    device = torch.device(device)
    if device.index is not None or device.type == "cpu":
        return device
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def device_count() -> int:
    """Returns the number of accelerators that this process sees."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def select(index: int) -> torch.device:
    """Makes one of the accelerator's devices the current one, and returns it."""
    torch.accelerator.set_device_index(index)
    return own_device()


def _of_backend(device: torch.device, name: str) -> Callable[..., Any] | None:
    """Returns a function of the backend's own module, such as `torch.cuda`, or None."""
    found: Callable[..., Any] | None = getattr(torch.get_device_module(device), name, None)
    return found


def device_label(device: torch.device) -> str:
    """Returns the product name of a device, or its name in torch."""
    ask = None if device.type == "cpu" else _of_backend(device, "get_device_name")
    return str(ask(device)) if ask is not None else str(device)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the CUDA compute capability; None for others. ROCm's numbers have another meaning."""
    if not runs_cuda_kernels(device) or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def reaches(device: torch.device, least: tuple[int, int]) -> bool:
    """Returns True if a device has at least this CUDA compute capability."""
    have = capability(device)
    return have is not None and have >= least


def free_memory(device: torch.device) -> int | None:
    """Returns the bytes that are free on a device."""
    if device.type == "mps":  # shares the host's memory, and knows what it should take of it
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    ask = _of_backend(device, "mem_get_info") or getattr(torch.accelerator, "get_memory_info", None)
    return None if ask is None else int(ask(device)[0])


def _statistic(device: torch.device, name: str) -> Callable[..., Any] | None:
    """Returns the function of an allocator's statistic; None where it keeps none."""
    if device.type in ("cpu", "mps"):
        return None
    return _of_backend(device, name) or getattr(torch.accelerator, name, None)


def reset_peak_memory(device: torch.device) -> None:
    """Lets the peak of allocated memory begin at what is allocated now."""
    if (reset := _statistic(device, "reset_peak_memory_stats")) is not None:
        torch.empty(1, dtype=torch.uint8, device=device)  # before its first allocation a backend may have no statistics
        reset(device)


def peak_memory(device: torch.device) -> int | None:
    """Returns the most bytes that tensors took on a device since the reset."""
    ask = _statistic(device, "max_memory_allocated")
    return None if ask is None else int(ask(device))


def random_state(device: torch.device) -> Tensor:
    """Returns the state of a device's random generator, uint8 on the CPU."""
    module = torch.get_device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Sets the state of a device's random generator."""
    module = torch.get_device_module(device)
    module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def group_backend() -> str:
    """Returns the backend of process groups: the accelerator's own beside gloo for CPU tensors, else gloo alone.

    torch has a table of them (NCCL, which is RCCL with ROCm, and XCCL), to which other backends add theirs (HCCL).
    """
    if not torch.accelerator.is_available():
        return "gloo"
    kind = own_device().type
    own = dist.Backend.default_device_backend_map.get(kind)
    return "gloo" if own in (None, "gloo") else f"cpu:gloo,{kind}:{own}"
