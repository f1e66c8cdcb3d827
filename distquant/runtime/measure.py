"""Measures `Environment` about the devices that ranks will use."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch

from distquant.accelerator.facts import capability, free_memory
from distquant.accelerator.names import runs_cuda_kernels
from distquant.environment import Environment, installed
from distquant.errors import InputError
from distquant.options import PlanOptions
from distquant.planning.runtime_memory import COMMUNICATOR, communicators
from distquant.quantization.registry import discover
from distquant.sharding.mesh import Mesh
from distquant.units import format_bytes

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "peft", "ray", "deepspeed")
"""Packages that distquant works with, whatever the method."""

SINGLE = Mesh()

PROCESS = 400 << 20
"""Bytes of host memory that a rank's process needs before it loads: Python, torch, transformers. Measured after a load
of a model of 1.4 MiB on a CPU: 490 MB resident, 160 MB of it pages of files, which ranks share."""


def watched() -> list[str]:
    """Returns the names of these packages, and of those that methods need."""
    needed = (package for scheme in discover().values() for package in scheme.requires)
    return list(dict.fromkeys((*PACKAGES, *needed)))


def packages() -> dict[str, str]:
    """Returns the installed versions of these packages; nothing is imported."""
    versions = ((name, installed(name)) for name in watched())
    return {name: version for name, version in versions if version is not None}


def host_memory() -> int:
    """Returns the bytes of host memory that are available."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_rank_count(ranks: int) -> None:
    """Raises `InputError` if so many ranks cannot be started on this machine, whatever they load."""
    need, have = ranks * PROCESS, host_memory()
    if need > have:
        sizes = f"{format_bytes(need)} for their processes, {format_bytes(have)} are free"
        fault = f"{ranks} ranks on this machine need {sizes}"
        raise InputError.one("mesh", fault, "Use fewer ranks, or join more machines (ray start, torchrun --nnodes)")


def node_name() -> str:
    """Returns a name that processes share if they can use shared memory: same machine, boot and temporary folder."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        shared = os.stat(tempfile.gettempdir())
        return f"{boot}/{shared.st_dev}/{shared.st_ino}"
    except OSError:
        return socket.gethostname()


def numbered(names: Sequence[str]) -> tuple[int, ...]:
    """Returns the node of each rank as a number, in order of appearance."""
    numbers: dict[str, int] = {}
    return tuple(numbers.setdefault(name, len(numbers)) for name in names)


def declared(options: PlanOptions) -> Environment:
    """Returns what the user has declared about the devices; what is not declared is checked at load."""
    memory = options.rank_memory()
    return Environment(
        capability=options.capability,
        memory=memory,
        memory_source="max_memory" if memory is not None else "unknown",
        packages=packages(),
    )


def weakest(ranks: Sequence[Environment]) -> Environment:
    """Returns what holds on every rank: the least memory, the lowest capability, and a word on what differs.

    Args:
        ranks: measured by each of them.
    """
    memory = min(ranks, key=lambda one: one.memory or 0)
    known = sorted({one.capability for one in ranks if one.capability is not None})
    least = known[0] if len(known) and all(one.capability is not None for one in ranks) else None
    source = memory.memory_source
    if len({one.memory for one in ranks}) > 1:
        source += f", rank {ranks.index(memory)} has least"
    return replace(
        ranks[0],
        memory=memory.memory,
        memory_source=source,
        capability=least,
        differing=tuple(known) if len(known) > 1 else (),
    )


def measure(
    device: torch.device,
    max_memory: int | None,
    nodes: tuple[int, ...] = (0,),
    rank: int = 0,
    mesh: Mesh = SINGLE,
) -> Environment:
    """Measures this rank and its device.

    Args:
        device: of this process.
        max_memory: bytes that a rank may fill, if declared.
        nodes: the node of each rank.
        rank: of this process.
        mesh: of the ranks.
    """
    free: int | None
    if device.type == "cpu":
        local_ranks = nodes.count(nodes[rank])
        free, source = host_memory() // local_ranks, "free on the host, divided by its ranks"
    else:
        free = free_memory(device)
        source = "unknown" if free is None else "free on the device"
        # What is free was asked of the driver when this process's context was there: only NCCL is to come.
        taken = COMMUNICATOR * communicators(mesh) if runs_cuda_kernels(device) else 0
        if free is not None and taken:
            free, source = max(free - taken, 0), f"{source}, less {format_bytes(taken)} for NCCL"
    return Environment(
        device_type=device.type,
        device_count=len(nodes),
        capability=capability(device),
        memory=free if max_memory is None else max_memory,
        memory_source=source if max_memory is None else "max_memory",
        nodes=nodes,
        packages=packages(),
    )
