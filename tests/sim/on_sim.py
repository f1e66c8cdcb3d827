"""What tests do where `sim` is a device. Every function is called by name in that process, and returns plain values."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import distquant as dq
from distquant.errors import RankError
from distquant.loading.loader import load_shard
from distquant.options import RunOptions
from distquant.parallel.comm import SoloAxis, SoloComm

SLOW = (50e9, 6e9, 1e-3)
"""Costs of copies: bytes a second from pinned and from other memory, and a millisecond for each."""


def faults() -> list[str]:
    import _sim

    return [what for what in _sim.counts() if what.startswith("FAULT")]


def differing(one: Any, other: Any) -> list[str]:
    """Names of the tensors that differ, wherever they lie."""
    theirs = dict(other.state_dict())
    mine = dict(one.state_dict())
    assert mine.keys() == theirs.keys()

    def raw(value: Tensor) -> Tensor:
        return value.detach().cpu().contiguous().view(-1).view(torch.uint8)

    return [name for name in mine if not torch.equal(raw(mine[name]), raw(theirs[name]))]


PLACES = {
    "model.embed_tokens": "sim:0", "model.layers.0": "sim:0", "model.rotary_emb": "sim:0",
    "model.layers.1": "sim:1", "model.norm": "sim:1", "lm_head": "sim:1",
}  # fmt: skip
"""Half of a model of two layers on each of two devices."""


def over_two_devices(path: str, quant: str, staging: str) -> dict[str, Any]:
    """Loads a model with its layers on two devices, and compares it with the load on the CPU."""
    import _sim

    plan = dq.plan(path, quantization_config=quant, device_map=PLACES, staging=staging)
    on_cpu = load_shard(dq.plan(path, quantization_config=quant, staging=staging), SoloComm(), "cpu")
    _sim.set_cost(*SLOW)
    _sim.reset_counts()
    model = load_shard(plan, SoloComm(), "sim:0")
    copies = _sim.counts().get("H2D pinned async", (0, 0))[0]
    return {
        "devices": sorted({str(value.device) for value in (*model.parameters(), *model.buffers())}),
        "differing": differing(model, on_cpu),
        "equal": dq.fingerprint(model) == dq.fingerprint(on_cpu),
        "copies": copies,
        "faults": faults(),
        "still pinned": len(_sim.registered()),
    }


# -- ranks on threads --------------------------------------------------------------------------------------------------


class Meeting:
    """What ranks on threads use to collect values."""

    def __init__(self, count: int):
        self._barrier, self._values = threading.Barrier(count, timeout=60), [None] * count

    def collect(self, position: int, value: Any) -> list[Any]:
        self._values[position] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


class StreamAxis(SoloAxis):
    """An axis whose collectives over a device's memory go to its current stream, as NCCL's do."""

    def __init__(self, rank: int, size: int, meeting: Meeting):
        self.rank, self.size, self._meeting = rank, size, meeting

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        import _sim

        assert op == "max"
        values = _sim.host_view(tensor)

        def collective() -> None:
            everyone = self._meeting.collect(self.rank, values.clone())
            values.copy_(torch.stack(everyone).amax(0))

        _sim.enqueue(tensor.device.index, collective)
        return tensor


class ThreadComm(SoloComm):
    """One of a number of ranks along `tp`."""

    def __init__(self, rank: int, size: int, meeting: Meeting, axis: Meeting, timeout: float):
        self.rank, self.world_size, self.timeout, self._meeting = rank, size, timeout, meeting
        self._axis = StreamAxis(rank, size, axis)

    def axis(self, name: str) -> SoloAxis:
        return self._axis if name == "tp" else SoloAxis()

    def collect(self, value: Any) -> list[Any]:
        return self._meeting.collect(self.rank, value)

    def share(self, value: Any) -> Any:
        return self.collect(value)[0]


def on_threads(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What each rank's thread returns; raises what the first of them raised."""
    found: dict[int, Any] = {}

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # each thread's own; a mean over two threads is another one
        try:
            found[rank] = (True, work(rank))
        except BaseException as error:
            found[rank] = (False, error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        if not found[rank][0]:
            raise found[rank][1]
    return [found[rank][1] for rank in range(size)]


def over_two_nodes(path: str, quant: str, staging: str, seconds: float) -> dict[str, Any]:
    """Four ranks of two nodes, each a thread with a device of its own; collectives run on the devices' streams."""
    import _sim

    on_cpu = dq.fingerprint(load_shard(dq.plan(path, quantization_config=quant), SoloComm(), "cpu"))
    plan = dq.plan(path, quantization_config=quant, mesh="tp=4", ranks_per_node=2, staging=staging)
    meeting, axis = Meeting(4), Meeting(4)
    _sim.set_cost(50e9, 6e9, seconds)

    def rank(number: int) -> str:
        comm = ThreadComm(number, 4, meeting, axis, timeout=60.0)
        torch.accelerator.set_device_index(number)
        if number % 2:  # as a user may load: all that a load does is to come in this order
            torch.accelerator.set_stream(torch.Stream(device=f"sim:{number}"))
        return dq.fingerprint(load_shard(plan, comm, f"sim:{number}"))

    found = on_threads(4, rank)
    return {"equal": set(found) == {on_cpu}, "faults": faults(), "still pinned": len(_sim.registered())}


# -- loads that end early ----------------------------------------------------------------------------------------------


def interrupted(path: str, staging: str) -> dict[str, Any]:
    """A load onto two devices that is interrupted while copies from its slots to the second still run."""
    import _sim

    plan = dq.plan(path, quantization_config="none", device_map=PLACES, staging=staging)
    _sim.set_cost(50e9, 6e9, 0.01)

    def progress(seen: Any) -> None:
        if seen.done > 0.8 * seen.total:
            raise KeyboardInterrupt

    try:
        load_shard(plan, SoloComm(), "sim:0", progress=progress)
        raised = None
    except KeyboardInterrupt:
        raised = "KeyboardInterrupt"
    copies = _sim.counts().get("H2D pinned async", (0, 0))[0]
    for device in ("sim:0", "sim:1"):
        torch.accelerator.synchronize(device)
    return {"raised": raised, "copies": copies, "faults": faults(), "still pinned": len(_sim.registered())}


class Hasty(SoloComm):
    """A lone rank with little patience."""

    timeout = 0.5


def device_that_stands_still(path: str) -> dict[str, Any]:
    """A load onto a device whose copies do not end, and what becomes of its memory when they do."""
    import _sim

    plan = dq.plan(path, quantization_config="none", device_map={"": "sim:1"}, staging="128KiB")
    _sim.hold(True)
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            load_shard(plan, Hasty(), "sim:1", RunOptions(io="buffered"))
            raised = ""
        except RankError as error:
            raised = str(error)
    seconds = time.monotonic() - begun
    kept = len(_sim.registered())
    _sim.hold(False)
    torch.accelerator.synchronize("sim:1")
    for address in _sim.registered():
        _sim.host_unregister(address)
    found = [str(each.message) for each in told if each.category is RuntimeWarning]
    return {"raised": raised, "warnings": found, "kept": kept, "faults": faults(), "seconds": seconds}
