"""Ranks of one node, each a thread with a simulated device of its own, and the copies that their load made."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from on_sim import faults
from thread_ranks import ThreadComm, on_threads

import distquant as dq
from distquant.loading.loader import load_shard
from distquant.loading.stream.emitter import Emitter
from distquant.loading.stream.engine import Engine
from distquant.loading.stream.tasks import Chunk
from distquant.options import RunOptions
from distquant.parallel.comm import SoloComm


def on_one_node(path: str, quant: str, ranks: int, staging: str, seconds: float) -> dict[str, Any]:
    """Loads a model with tp over as many devices; returns also what was counted on all of them together."""
    import _sim

    on_cpu = dq.fingerprint(load_shard(dq.plan(path, quantization_config=quant), SoloComm(), "cpu"))
    plan = dq.plan(path, quantization_config=quant, mesh=f"tp={ranks}", staging=staging)
    _sim.set_cost(50e9, 6e9, seconds)
    _sim.reset_counts()

    def rank(comm: ThreadComm) -> Any:
        torch.accelerator.set_device_index(comm.rank)
        return load_shard(plan, comm, f"sim:{comm.rank}", RunOptions())

    read = Emitter.consume
    pieces: list[int] = []

    def consume(emitter: Emitter, chunk: Chunk) -> None:
        pieces.append(1)
        read(emitter, chunk)

    count, readers = Engine._readers, set[int]()

    def counted(engine: Engine) -> int:
        readers.add(count(engine))
        return max(readers)

    own_cores = mock.patch("distquant.loading.stream.engine.cores_of_a_rank", lambda ranks: 8)  # a real node has them
    with own_cores, mock.patch.object(Emitter, "consume", consume), mock.patch.object(Engine, "_readers", counted):
        models = on_threads(plan.mesh, rank)
    counts = dict(_sim.counts())
    found = on_threads(plan.mesh, lambda comm: dq.fingerprint(models[comm.rank]))
    return {
        "equal": set(found) == {on_cpu},
        "faults": faults(),
        "still pinned": len(_sim.registered()),
        "counts": counts,
        "tensors": len(plan.tensors),
        "pieces": len(pieces),
        "readers": readers,
    }
