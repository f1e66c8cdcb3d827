"""`Comm` over torch.distributed. Process groups are created here, and nowhere else in distquant.

Nothing here keeps a group alive past `destroy_process_group`, which ends gloo's worker threads with their group. A
worker thread that lives until the interpreter ends may still hold a tensor of the last collective. To release it, it
asks for the interpreter's lock. Python up to 3.12 then ends the thread inside a C++ destructor, and that ends the
process (SIGABRT, "terminate called without an active exception").

`torch.distributed.nn.functional`, which transformers imports, is imported before there is a group: its functions take
as their default the group that is the default at import, and would keep it alive.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor

from distquant.accelerator.facts import group_backend
from distquant.errors import RankError
from distquant.parallel.comm import DEFAULT_TIMEOUT, Axis, SoloAxis
from distquant.runtime.collectives import collect, finish, share, silent_rank
from distquant.runtime.meeting import Meeting
from distquant.runtime.own_device import is_shared
from distquant.sharding.mesh import AXES, REPLICA, Mesh

OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class GroupAxis:
    """One mesh axis as a process group of torch, which `destroy_process_group` ends; a model may outlive it."""

    def __init__(self, group: dist.ProcessGroup, ranks: tuple[int, ...], rank: int):
        self._group, self.ranks = weakref.ref(group), ranks
        self.rank, self.size = ranks.index(rank), len(ranks)

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            RuntimeError: it was destroyed.
        """
        group = self._group()
        if group is None:
            raise RuntimeError("the model's process groups were destroyed (destroy_process_group); load it again")
        return group

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        finish(dist.all_reduce(tensor, OPS[op], group=self.group, async_op=True), tensor)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Pads to the longest, because backends need equal sizes, and joins the parts without padding."""
        longest = max(sizes)
        moved = tensor.movedim(dim, 0)
        padded = torch.zeros((longest, *moved.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        padded[: moved.shape[0]] = moved
        parts = [torch.empty_like(padded) for _ in sizes]
        finish(dist.all_gather(parts, padded, group=self.group, async_op=True), padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        finish(dist.broadcast(tensor, self.ranks[source], group=self.group, async_op=True), tensor)
        return tensor

    def all_to_all(self, tensor: Tensor, sent: list[int], got: list[int]) -> Tensor:
        result = tensor.new_empty((sum(got), *tensor.shape[1:]))
        finish(dist.all_to_all_single(result, tensor, got, sent, group=self.group, async_op=True), tensor)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupAxis:
        return self


class GroupComm:
    """All ranks of an initialized default process group, arranged as a mesh.

    An axis over all ranks is `everyone`, an axis of one rank needs none: making a group is a rendezvous.
    """

    def __init__(self, mesh: Mesh, timeout: float | None = None, everyone: dist.ProcessGroup | None = None):
        """Makes the groups of the mesh's axes.

        Args:
            mesh: of all ranks.
            timeout: seconds that a rank waits for the others.
            everyone: a group of all ranks that has this timeout; None: the default group.
        """
        self.mesh = mesh
        self.timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        self._everyone = weakref.ref(_world() if everyone is None else everyone)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        assert self.world_size == mesh.size, "the mesh is checked against the world before groups are made"
        self._axes: dict[str, Axis] = dict.fromkeys((*AXES, REPLICA), SoloAxis())
        for axis in (*AXES, REPLICA):
            groups = sorted({mesh.peers(rank, axis) for rank in range(mesh.size)})
            if len(groups) == mesh.size:
                continue
            if axis == REPLICA and (mesh.ep == 1 or mesh.tp == 1):
                self._axes[axis] = self._axes["tp" if mesh.ep == 1 else "ep"]
                continue
            for ranks in groups:
                # torch wants every rank to make every group, in the same order.
                # Without a timeout of its own, a new group has torch's, not that of the default group.
                group = make_group(ranks, self.timeout) if len(groups) > 1 else self._everyone()
                assert group is not None
                if self.rank in ranks:
                    self._axes[axis] = GroupAxis(group, ranks, self.rank)

    def axis(self, name: str) -> Axis:
        return self._axes[name]

    def share(self, value: Any) -> Any:
        return share(value, self._everyone())

    def collect(self, value: Any) -> list[Any]:
        return collect(value, self._everyone())

    def silent(self, seconds: float | None = None) -> RankError | None:
        return silent_rank(seconds)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def make_group(ranks: Sequence[int] | None, timeout: float) -> dist.ProcessGroup:
    """Returns a group of these ranks (None: of all) in which a rank waits for `timeout` seconds; all ranks call it."""
    # Not the default group's backend: a caller's own may have no way for tensors of the CPU.
    group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout), backend=backend())
    assert group is not None
    return group


_SIDE_GROUPS: weakref.WeakKeyDictionary[dist.ProcessGroup, weakref.ref[dist.ProcessGroup]]
_SIDE_GROUPS = weakref.WeakKeyDictionary()
"""A caller's default group -> the group of all ranks that was made beside it."""


def for_host_tensors() -> dist.ProcessGroup | None:
    """Returns a group of all ranks that takes tensors of the CPU; None: the default group does.

    A caller's own group may be of NCCL alone, which knows GPUs only. The group beside it is made once; all ranks call.
    """
    if "cpu:" in dist.get_backend_config():
        return None
    made = _SIDE_GROUPS.get(_world())
    side = made() if made is not None else None
    if side is None:
        side = make_group(None, DEFAULT_TIMEOUT)
        _SIDE_GROUPS[_world()] = weakref.ref(side)
    return side


def backend() -> str:
    """Returns the backend: the accelerator's own beside gloo, or gloo alone where ranks share devices: NCCL refuses."""
    return "gloo" if is_shared() else group_backend()


def init(meeting: Meeting, timeout: float | None = None) -> None:
    """Joins the default process group.

    Args:
        meeting: where ranks meet.
        timeout: seconds that a rank waits for the others.
    """
    limit = datetime.timedelta(seconds=DEFAULT_TIMEOUT if timeout is None else timeout)
    store, rank, world_size = meeting
    store.set_timeout(limit)
    dist.init_process_group(backend(), timeout=limit, rank=rank, world_size=world_size, store=store)
