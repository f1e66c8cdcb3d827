"""Measures `Facts` about the devices that ranks will use."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence

import torch

from distquant.facts import Facts, installed

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "peft",
    "ray",
    "deepspeed",
    "torchao",
    "safetensors",
    "hqq",
    "gguf",
)


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


def node_name() -> str:
    """Equal for processes that can meet in shared memory: same machine, same boot, same folder for temporary files."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        shared = os.stat(tempfile.gettempdir())
        return f"{boot}/{shared.st_dev}/{shared.st_ino}"
    except OSError:
        return socket.gethostname()


def numbered(names: Sequence[str]) -> tuple[int, ...]:
    """The node of each rank as a number, in order of appearance."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(name, len(numbers)) for name in names)


def measure(device: torch.device, max_memory: int | None, nodes: tuple[int, ...] = (0,), rank: int = 0) -> Facts:
    """Facts of ranks on devices like `device`.

    Args:
        device: of this process.
        max_memory: bytes that a rank may fill, if the user said so.
        nodes: the node of each rank.
        rank: of this process.
    """
    capability = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        free, source = torch.cuda.mem_get_info(device)[0], "free on the device"
    else:
        local_ranks = nodes.count(nodes[rank])
        free, source = host_memory() // local_ranks, "free on the host, divided by its ranks"
    return Facts(
        device_type=device.type,
        device_count=len(nodes),
        capability=capability,
        memory=free if max_memory is None else max_memory,
        memory_source=source if max_memory is None else "max_memory",
        nodes=nodes,
        packages=packages(),
    )
