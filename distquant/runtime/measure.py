"""Measures `Facts` about the devices that ranks will use."""

from __future__ import annotations

import os

import torch

from distquant.facts import Facts, installed

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "peft", "ray", "deepspeed", "torchao", "safetensors")


def packages() -> dict[str, str]:
    """Installed versions of what distquant can work with; nothing is imported."""
    found = ((name, installed(name)) for name in PACKAGES)
    return {name: version for name, version in found if version is not None}


def host_memory() -> int:
    """Bytes of host memory that can still be had."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure(ranks: int, device: torch.device, max_memory: int | None, local_ranks: int = 1) -> Facts:
    """Facts of `ranks` ranks, `local_ranks` of them on this node, each on a device like `device`."""
    capability = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        free, source = torch.cuda.mem_get_info(device)[0], "free on the device"
    else:
        free, source = host_memory() // max(local_ranks, 1), "free on the host, divided by its ranks"
    return Facts(
        device_type=device.type,
        device_count=ranks,
        capability=capability,
        memory=free if max_memory is None else max_memory,
        memory_source=source if max_memory is None else "max_memory",
        packages=packages(),
    )
