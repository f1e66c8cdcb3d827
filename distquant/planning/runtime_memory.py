"""The memory of a GPU that CUDA and NCCL take beside all tensors: stated constants, with their source."""

from __future__ import annotations

from collections.abc import Iterator

from distquant.accelerator.names import CUDA
from distquant.environment import Environment
from distquant.sharding.mesh import Mesh

CONTEXT = 534 << 20
"""Bytes of a process's CUDA context on an H100, as https://github.com/meta-pytorch/torchcomms/pull/777 has measured."""

COMMUNICATOR = 688 << 20
"""Bytes that NCCL takes for each communicator of more than two ranks, by default. Measured on four A100 with NVLink:
https://github.com/NVIDIA/nccl/issues/964. More channels (H100), all-to-all and some algorithms take more."""


def communicators(mesh: Mesh) -> int:
    """Returns how many communicators a rank has for its model: one for each axis of its parts, and one for both."""
    axes = (mesh.tp > 1) + (mesh.ep > 1)
    return axes + (axes == 2)


def notes(mesh: Mesh, environment: Environment) -> Iterator[str]:
    """Yields what a declared limit has to leave free. A measured one is less the context and NCCL already."""
    if environment.memory is None or environment.memory_source != "max_memory":
        return
    if environment.device_type == CUDA or (environment.device_type is None and environment.capability is not None):
        count = communicators(mesh)
        nccl = f", and NCCL about {COMMUNICATOR >> 20} MiB for each communicator ({count})" if count else ""
        yield f"not counted: a CUDA context takes about {CONTEXT >> 20} MiB{nccl}; max_memory is to leave them free"
