"""Ranks that are threads of one process, each with a device of its own. Their collectives run on devices' streams.

Values of the host go one way and tensors of devices another, as over gloo and NCCL. A collective of a device blocks its
stream until all ranks of the axis are there, and not the thread that has called it.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distquant.parallel.comm import SoloAxis, SoloComm
from distquant.sharding.mesh import AXES, REPLICA, Mesh

PATIENCE = 60.0
"""Seconds that a rank waits for the others."""


class Meeting:
    """What ranks on threads use to collect values."""

    def __init__(self, count: int):
        self._barrier, self._values = threading.Barrier(count, timeout=PATIENCE), [None] * count

    def collect(self, position: int, value: Any) -> list[Any]:
        self._values[position] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def abort(self) -> None:
        self._barrier.abort()


class World:
    """All ranks of a mesh: where they meet, on the host and on devices."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.everyone = mesh, Meeting(mesh.size)
        groups = {mesh.peers(rank, axis) for rank in range(mesh.size) for axis in (*AXES, REPLICA)}
        names = [(axis, peers) for axis in (*AXES, REPLICA) for peers in groups]
        self.on_host = {name: Meeting(len(name[1])) for name in names}
        self.on_devices = {name: Meeting(len(name[1])) for name in names}

    def abort(self) -> None:
        """Ends all waits, as a process group does that is aborted."""
        for meeting in (self.everyone, *self.on_host.values(), *self.on_devices.values()):
            meeting.abort()


class ThreadAxis(SoloAxis):
    """One axis of the mesh."""

    def __init__(self, world: World, name: str, peers: tuple[int, ...], rank: int):
        self.rank, self.size = peers.index(rank), len(peers)
        self._on_host, self._on_devices = world.on_host[name, peers], world.on_devices[name, peers]

    def _collective(self, tensor: Tensor, result: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Fills `result` with what is combined of all ranks' tensors."""
        if tensor.device.type == "cpu":
            result.copy_(combine(self._on_host.collect(self.rank, tensor.clone())))
            return result
        import _sim

        def on_stream() -> None:
            try:
                everyone = self._on_devices.collect(self.rank, _sim.host_view(tensor).clone())
            except threading.BrokenBarrierError:
                return  # aborted: the stream goes on
            _sim.host_view(result).copy_(combine(everyone))

        _sim.enqueue(tensor.device.index, on_stream)
        return result

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        def combine(everyone: list[Tensor]) -> Tensor:
            return functools.reduce(torch.maximum if op == "max" else operator.add, everyone)

        return self._collective(tensor, tensor, combine)

    def all_gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = sum(sizes)
        return self._collective(tensor, tensor.new_empty(shape), lambda everyone: torch.cat(everyone, dim))

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return self._collective(tensor, tensor, lambda everyone: everyone[source])

    def all_to_all(self, tensor: Tensor, sent: list[int], received: list[int]) -> Tensor:
        position = self.rank
        counts = self._on_host.collect(self.rank, sent)

        def combine(everyone: list[Tensor]) -> Tensor:
            return torch.cat([rows.split(of)[position] for rows, of in zip(everyone, counts, strict=True)])

        return self._collective(tensor, tensor.new_empty((sum(received), *tensor.shape[1:])), combine)


class ThreadComm(SoloComm):
    """One of the ranks."""

    def __init__(self, rank: int, world: World):
        self.rank, self.world_size, self.timeout, self._everyone = rank, world.mesh.size, PATIENCE, world.everyone
        peers = {axis: world.mesh.peers(rank, axis) for axis in (*AXES, REPLICA)}
        self._axes = {
            axis: ThreadAxis(world, axis, group, rank) if len(group) > 1 else SoloAxis()
            for axis, group in peers.items()
        }

    def axis(self, name: str) -> SoloAxis:
        return self._axes[name]

    def collect(self, value: Any) -> list[Any]:
        return self._everyone.collect(self.rank, value)

    def share(self, value: Any) -> Any:
        return self.collect(value)[0]


def outcomes(mesh: Mesh, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """What each rank's thread returns, or the error that it raises; the first ends the others' collectives."""
    found: list[Any] = [None] * mesh.size
    world = World(mesh)

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # each thread's own; a mean over two threads is another one
        try:
            found[rank] = work(ThreadComm(rank, world))
        except BaseException as error:
            found[rank] = error
            world.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def on_threads(mesh: Mesh, work: Callable[[ThreadComm], Any]) -> list[Any]:
    """What each rank's thread returns; raises what one of them raised."""
    found = outcomes(mesh, work)
    errors = [each for each in found if isinstance(each, BaseException)]
    for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
        raise error
    return found
