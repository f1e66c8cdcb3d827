"""What tests do where `sim` is a device. Every function is called by name in that process, and returns plain values."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from thread_ranks import ThreadComm, on_threads
from torch import Tensor

import distquant as dq
from distquant.errors import RankError
from distquant.loading.loader import load_shard
from distquant.options import RunOptions
from distquant.parallel.comm import SoloComm

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


def over_two_nodes(path: str, quant: str, staging: str, seconds: float) -> dict[str, Any]:
    """Four ranks of two nodes, each a thread with a device of its own; collectives run on the devices' streams."""
    import _sim

    on_cpu = dq.fingerprint(load_shard(dq.plan(path, quantization_config=quant), SoloComm(), "cpu"))
    plan = dq.plan(path, quantization_config=quant, mesh="tp=4", ranks_per_node=2, staging=staging)
    _sim.set_cost(50e9, 6e9, seconds)

    def rank(comm: ThreadComm) -> str:
        number = comm.rank
        torch.accelerator.set_device_index(number)
        if number % 2:  # as a user may load: all that a load does is to come in this order
            torch.accelerator.set_stream(torch.Stream(device=f"sim:{number}"))
        return dq.fingerprint(load_shard(plan, comm, f"sim:{number}"))

    found = on_threads(plan.mesh, rank)
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
