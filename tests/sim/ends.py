"""Loads onto the simulated device in disorder, and loads that end early. Every function is called in that process."""

from __future__ import annotations

import functools
import gc
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from loads import expected_of, split
from on_sim import faults
from thread_ranks import outcomes

import distquant as dq
from distquant.loading.loader import load_shard
from distquant.parallel.comm import SoloComm
from distquant.planning import LoadPlan
from distquant.sharding.mesh import Mesh

ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "two devices": {},
    "two ranks": {"mesh": "tp=2"},
    "two nodes": {"mesh": "tp=4", "ranks_per_node": 2},
}


def _plan(path: str, quant: str, arrangement: str, staging: str) -> LoadPlan:
    given = ARRANGEMENTS[arrangement] or {"device_map": split(2)}
    return dq.plan(path, quantization_config=quant, staging=staging, **given)


def _load(plan: LoadPlan, comm: SoloComm, progress: Callable[[Any], None] | None = None) -> Any:
    torch.accelerator.set_device_index(comm.rank)
    return load_shard(plan, comm, f"sim:{comm.rank}", progress=progress)


def _everyone(plan: LoadPlan, work: Callable[[Any], Any]) -> list[Any]:
    return outcomes(plan.mesh if plan.device_map is None else Mesh(), work)


def in_disorder(path: str, quant: str, staging: str, seeds: range) -> list[Any]:
    """Loads while each piece of a stream's work is late at random; returns what did not go well."""
    import _sim

    expected = expected_of(path, quant, "auto")
    plans = [_plan(path, quant, each, staging) for each in ARRANGEMENTS]
    wrong = []
    for seed in seeds:
        plan = plans[seed % len(plans)]
        _sim.set_jitter(seed, random.Random(seed).choice([1e-4, 5e-4, 2e-3]))
        found = _everyone(plan, lambda comm, plan=plan: dq.fingerprint(_load(plan, comm)))
        if set(map(str, found)) != {expected} or faults():
            wrong.append((seed, [str(each) for each in found], faults()))
    return wrong


class Ended(Exception):
    """What a test makes a load fail with."""


def _load_until(plan: LoadPlan, kind: type[BaseException], chosen: int, share: float, comm: SoloComm) -> None:
    """Loads; on one rank it fails when a share is there, unless its device is what fails."""

    def progress(seen: Any) -> None:
        if comm.rank == chosen and kind is not torch.OutOfMemoryError and seen.done >= share * seen.total:
            raise kind

    _load(plan, comm, progress)


def ended_at_random(path: str, quant: str, staging: str, seeds: range) -> list[Any]:
    """Ends loads early, by an error, an interrupt or too little memory; returns what they left behind."""
    import _sim

    plans = [_plan(path, quant, each, staging) for each in ARRANGEMENTS]
    for plan in plans:  # tables of codes are made once for each device, and stay
        _everyone(plan, functools.partial(_load, plan))
    before, wrong = {thread.ident for thread in threading.enumerate()}, []
    gc.collect()
    memory = dict(_sim.memory()[0])
    for seed in seeds:
        chance, plan = random.Random(seed), plans[seed % len(plans)]
        ranks = plan.mesh.size if plan.device_map is None else 1
        chosen, moment = chance.randrange(ranks), chance.random()
        kind = chance.choice([Ended, KeyboardInterrupt, torch.OutOfMemoryError])
        _sim.set_jitter(seed, 5e-4)
        if kind is torch.OutOfMemoryError:
            _sim.run_out_of_memory(chosen, int(moment * 30))

        found = _everyone(plan, functools.partial(_load_until, plan, kind, chosen, moment))
        for device in range(_sim.device_count()):
            _sim.run_out_of_memory(device, -1)
        # A listening thread may be the one to fail: then the error says what it met.
        own = isinstance(found[chosen], kind) or kind.__name__ in str(found[chosen])
        errors = [f"{type(each).__name__}: {each}"[:200] for each in found]
        del found
        left = _left_behind(before, memory)
        if not own or left:
            wrong.append({"seed": seed, "kind": kind.__name__, "errors": errors, "left": left})
    return wrong


def _left_behind(threads: set[int | None], memory: dict[int, int]) -> dict[str, Any]:
    """What is there now and was not before: threads, bytes of devices, registered memory; and copies that came late."""
    import _sim

    _sim.set_jitter(0, 0.0)
    until = time.monotonic() + 5
    while True:
        gc.collect()
        for device in range(_sim.device_count()):
            torch.accelerator.synchronize(f"sim:{device}")
        found = {
            "threads": [each.name for each in threading.enumerate() if each.ident not in threads],
            "memory": {device: size for device, size in _sim.memory()[0].items() if size > memory.get(device, 0)},
            "pinned": len(_sim.registered()),
            "faults": faults(),
        }
        left = {name: what for name, what in found.items() if what}
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.02)


def without_pinning(path: str, quant: str, staging: str) -> dict[str, Any]:
    """A load whose memory cannot be pinned."""
    import _sim

    expected = expected_of(path, quant, "auto")
    plan = _plan(path, quant, "two devices", staging)
    _sim.reset_counts()
    _sim.fail_registrations(True)
    model = _load(plan, SoloComm())
    counts = _sim.counts()
    return {
        "equal": dq.fingerprint(model) == expected,
        "pinned": sum(times for what, (times, _) in counts.items() if "pinned" in what),
        "faults": faults(),
    }


def counted(path: str, quant: str, staging: str) -> dict[str, int]:
    """Pieces and tensors of a load onto one device; copies, and all that the host waited for, while it ran."""
    import _sim

    plan = dq.plan(path, quantization_config=quant, device_map={"": "sim:0"}, staging=staging)
    pieces = []
    _sim.reset_counts()
    load_shard(plan, SoloComm(), "sim:0", progress=pieces.append)
    counts = {what: times for what, (times, _) in _sim.counts().items() if not what.startswith("op ")}
    return {"pieces": len(pieces), "tensors": len(plan.tensors), "converted": len(plan.converted), **counts}
