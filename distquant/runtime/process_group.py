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
import errno
import os
import socket
import traceback
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor

from distquant.errors import InputError, Problems, one_line
from distquant.parallel.comm import DEFAULT_TIMEOUT, Axis, SoloAxis
from distquant.runtime import addresses
from distquant.runtime.addresses import LOOPBACK as LOOPBACK
from distquant.runtime.addresses import stay_on_this_machine as stay_on_this_machine
from distquant.runtime.values import from_bytes, to_bytes
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
        dist.all_reduce(tensor, OPS[op], group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Pads to the longest, because backends need equal sizes, and joins the parts without padding."""
        longest = max(sizes)
        moved = tensor.movedim(dim, 0)
        padded = torch.zeros((longest, *moved.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        padded[: moved.shape[0]] = moved
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(tensor, self.ranks[source], group=self.group)
        return tensor

    def all_to_all(self, tensor: Tensor, sent: list[int], got: list[int]) -> Tensor:
        result = tensor.new_empty((sum(got), *tensor.shape[1:]))
        dist.all_to_all_single(result, tensor, got, sent, group=self.group)
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


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def make_group(ranks: Sequence[int] | None, timeout: float) -> dist.ProcessGroup:
    """Returns a group of these ranks (None: of all) in which a rank waits for `timeout` seconds; all ranks call it."""
    group = dist.new_group(ranks, timeout=datetime.timedelta(seconds=timeout))
    assert group is not None
    return group


def share(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Returns rank 0's value on every rank of a group of all ranks; None: the default group.

    Raises:
        RankError: the bytes that came are not a value that ranks send.
    """
    device = _device(group)
    sent = to_bytes(value).to(device)
    size = torch.tensor(sent.numel(), device=device)
    dist.broadcast(size, 0, group)
    if dist.get_rank() == 0:
        dist.broadcast(sent, 0, group)
        return value
    sent = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(sent, 0, group)
    return from_bytes(sent, 0)


def collect(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns every rank's value, in rank order; `group` and errors as in `share`."""
    own = to_bytes(value).to(_device(group))
    size = torch.tensor([own.numel()], device=own.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size, group)
    longest = max(int(each) for each in sizes)  # backends need equal sizes
    parts = [own.new_empty(longest) for _ in sizes]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - own.numel())), group)
    return [from_bytes(part[: int(each)], rank) for rank, (part, each) in enumerate(zip(parts, sizes, strict=True))]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Returns where a group's collectives take tensors: one of the user's may know GPUs only."""
    accelerator = None if "cpu:" in dist.get_backend_config(group) else torch.accelerator.current_accelerator()
    return accelerator or torch.device("cpu")


def is_lost_peer(error: RuntimeError) -> bool:
    """Returns True if a collective of torch failed, as it does when another rank ends or does not answer.

    NCCL's errors have a type. Gloo raises plain RuntimeErrors: they are known by where they are raised, which is inside
    torch.distributed. A collective with invalid arguments raises other types.
    """
    if isinstance(error, dist.DistError):
        return True
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((name for name in reversed(modules) if name != "torch._ops"), "")  # which calls every operator
    return inner.split(".")[:2] == ["torch", "distributed"]


def backend() -> str:
    """Returns the backend: NCCL where there are GPUs (with gloo for CPU tensors), gloo otherwise."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def serve(address: str, port: int = 0) -> dist.TCPStore:
    """Opens the store at which ranks meet, at this address only; torch's own would listen at all addresses.

    Args:
        address: name or address of this machine.
        port: 0 = any that is free.

    Raises:
        OSError: nothing can listen there.
    """
    family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not in use by connections that have ended
        listener.bind(where)
        listener.listen(socket.SOMAXCONN)
        own, port = listener.getsockname()[:2]
        return dist.TCPStore(  # owns the descriptor from now on
            own, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
        )


def connect(address: str, port: int, timeout: float = DEFAULT_TIMEOUT) -> dist.TCPStore:
    """Returns the store that another rank serves, once it does."""
    return dist.TCPStore(address, port, None, False, datetime.timedelta(seconds=timeout))


def init(
    timeout: float | None = None,
    rank: int = -1,
    world_size: int = -1,
    store: dist.Store | None = None,
    interface: str | None = None,
) -> None:
    """Joins the default process group: at a store, or where the environment says.

    Args:
        timeout: seconds that a rank waits for the others.
        rank: this one, with a store.
        world_size: number of ranks, with a store.
        store: where ranks meet.
        interface: name of the network interface that ranks listen on; None: that which leads to the others.

    Raises:
        InputError: there is no such interface, or ranks cannot meet where the environment says.
    """
    seconds = DEFAULT_TIMEOUT if timeout is None else timeout
    limit, given = datetime.timedelta(seconds=seconds), store is not None
    try:
        if store is None:
            rank, world_size, store = _meet(seconds, interface)
        store.set_timeout(limit)
        dist.init_process_group(backend(), timeout=limit, rank=rank, world_size=world_size, store=store)
    except dist.DistNetworkError as error:
        if given:
            raise
        raise _unreachable(error) from error


def _meet(timeout: float, interface: str | None) -> tuple[int, int, dist.TCPStore]:
    """Returns rank, ranks and the store at which a launcher's ranks meet: torchrun's, or one of rank 0's own."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = addresses.place_ranks(interface, host)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return rank, world, connect(host, port, timeout)
    addresses.check_reached(place, host)
    if rank != 0:
        return rank, world, connect(place, port, timeout)
    try:
        own = addresses.own(place, interface)
        store = serve(own, port)
    except OSError as error:
        raise _unreachable(error) from error
    if own != place:
        connect(place, port, timeout)  # the others will: it must lead here
    return rank, world, store


def _unreachable(error: Exception) -> InputError:
    """Returns the error of ranks that cannot meet where the environment says."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if getattr(error, "errno", None) == errno.EADDRINUSE:
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
