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
import os
import socket
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor

from distquant.errors import InputError, Problems, RankError, one_line
from distquant.parallel.comm import DEFAULT_TIMEOUT, Axis, SoloAxis
from distquant.runtime.collectives import collect, finish, share, silent_rank
from distquant.runtime.heartbeat import Meeting
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
    group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout))
    assert group is not None
    return group


def backend() -> str:
    """Returns the backend: NCCL where there are GPUs (with gloo for CPU tensors), gloo otherwise."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


LOOPBACK = "127.0.0.1"

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the network interface on which ranks listen."""


def serve(address: str) -> dist.TCPStore:
    """Opens the store at which ranks meet, at this address only; torch's own would listen at all addresses."""
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen(socket.SOMAXCONN)
        port = listener.getsockname()[1]
        return dist.TCPStore(  # owns the descriptor from now on
            address, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def connect(address: str, port: int) -> dist.TCPStore:
    """Returns the store that another rank serves."""
    return dist.TCPStore(address, port, None, False)


def stay_on_this_machine() -> None:
    """Makes the ranks of this process, and of those that it starts, listen on the loopback interface only.

    An interface that the user has named is kept.
    """
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    for variable in INTERFACES if name is not None else ():
        os.environ.setdefault(variable, str(name))


def meet(timeout: float | None = None) -> Meeting:
    """Opens the store that the environment names (`env://`); if that is this rank's to serve, opens it for all.

    Raises:
        InputError: no store can be reached.
    """
    try:
        return Meeting(*next(iter(dist.rendezvous("env://", timeout=_delta(timeout)))))
    except dist.DistNetworkError as error:
        raise _unreachable(error) from error


def init(meeting: Meeting, timeout: float | None = None) -> None:
    """Joins the default process group."""
    store, rank, world_size = meeting
    dist.init_process_group(backend(), timeout=_delta(timeout), rank=rank, world_size=world_size, store=store)


def _delta(timeout: float | None) -> datetime.timedelta:
    return datetime.timedelta(seconds=DEFAULT_TIMEOUT if timeout is None else timeout)


def _unreachable(error: dist.DistNetworkError) -> InputError:
    """Returns the error of ranks that cannot meet where the environment says."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in str(error):
        fix = "Set MASTER_PORT to a free one; torchrun --standalone finds one itself"
        return InputError.one("MASTER_PORT", f"another process listens at {address} already", fix)
    fault = f"rank {os.environ.get('RANK')} cannot meet the others at {address} ({one_line(error)})"
    return InputError.one("MASTER_ADDR", fault, "Set MASTER_ADDR and MASTER_PORT to where rank 0 runs")


def check_launcher() -> None:
    """Checks the variables by which a launcher tells a process its place among several ranks.

    Raises:
        InputError: some are missing, or no numbers.
    """
    problems, needed = Problems(), ("RANK", "WORLD_SIZE", "MASTER_PORT")
    fix = "Start ranks with torchrun, which sets it, or set it as torch.distributed's env:// wants it"
    for name in (*needed, "MASTER_ADDR"):
        value = os.environ.get(name)
        if not value:
            problems.add(name, "not set, and this process is one of several ranks", fix)
        elif name in needed and not value.strip().isdigit():
            problems.add(name, f"{value!r} is not a number", fix)
    problems.raise_if_any()
