"""`Comm` over torch.distributed. Process groups are created here, and nowhere else in distquant."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distquant.comm import DEFAULT_TIMEOUT
from distquant.mesh import AXES, Mesh

OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class GroupAxis:
    """One mesh axis as a process group."""

    def __init__(self, group: dist.ProcessGroup, ranks: tuple[int, ...], rank: int):
        self.group, self.ranks = group, ranks
        self.rank, self.size = ranks.index(rank), len(ranks)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        dist.all_reduce(tensor, OPS[op], group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Pads to the longest, because backends want equal sizes, and joins what is real."""
        longest = max(sizes)
        moved = tensor.movedim(dim, 0)
        padded = torch.zeros((longest, *moved.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        padded[: moved.shape[0]] = moved
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).movedim(0, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(tensor, self.ranks[source], group=self.group)
        return tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupAxis:
        return self


class GroupComm:
    """All ranks of an initialized default process group, arranged as a mesh."""

    def __init__(self, mesh: Mesh, timeout: float | None = None):
        self.mesh = mesh
        self.timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        assert self.world_size == mesh.size, "the mesh is checked against the world before groups are made"
        self._axes: dict[str, GroupAxis] = {}
        for axis in AXES:
            for first in sorted({mesh.peers(rank, axis) for rank in range(mesh.size)}):
                group = dist.new_group(first)  # every rank makes every group, in the same order
                if self.rank in first:
                    self._axes[axis] = GroupAxis(group, first, self.rank)

    def axis(self, name: str) -> GroupAxis:
        return self._axes[name]

    def share(self, value: Any) -> Any:
        return share(value)

    def collect(self, value: Any) -> list[Any]:
        return collect(value)


def share(value: Any) -> Any:
    """Rank 0's value, on every rank of the default group."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def collect(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def backend() -> str:
    """NCCL where there are GPUs (with gloo for what lies on the CPU), gloo otherwise."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def init(
    rank: int | None = None, world_size: int | None = None, url: str = "env://", timeout: float | None = None
) -> None:
    """Joins the default process group."""
    arguments: dict[str, Any] = {} if rank is None else {"rank": rank, "world_size": world_size}
    seconds = DEFAULT_TIMEOUT if timeout is None else timeout
    dist.init_process_group(backend(), init_method=url, timeout=datetime.timedelta(seconds=seconds), **arguments)
