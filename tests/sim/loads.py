"""Loads onto the simulated device, as the matrix of tests wants them. Every function is called in that process."""

from __future__ import annotations

import functools
import gc
from typing import Any

import torch
from on_sim import faults
from thread_ranks import ThreadComm, on_threads

import distquant as dq
from distquant.loading.loader import load_shard
from distquant.parallel.comm import SoloComm

PROMPT = [[1, 17, 43, 9, 88, 5, 31, 2]]


def split(devices: int) -> dict[str, str]:
    """Puts a model of two layers on some devices: embeddings, layers and head in turn."""
    if devices == 1:
        return {"": "sim:1"}  # not the device that is current without a word
    last = devices - 1
    return {
        "model.embed_tokens": "sim:0", "model.rotary_emb": "sim:0", "model.layers.0": "sim:0",
        "model.layers.1": "sim:1", "model.norm": f"sim:{last}", "lm_head": f"sim:{last}",
    }  # fmt: skip


def answers(model: Any, device: str) -> tuple[list[float], list[int]]:
    """Logits of the last token, and the tokens of a short answer."""
    prompt = torch.tensor(PROMPT, device=device)
    with torch.no_grad():
        logits = model(prompt).logits[0, -1].float().cpu().tolist()
    greedy = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return logits, greedy[0].tolist()


def on_devices(path: str, quant: Any, devices: int, staging: str, seconds: float, asks: bool) -> dict[str, Any]:
    """One process, with its layers on some devices."""
    import _sim

    same = {"quantization_config": quant, "dtype": "float32" if asks else "auto"}
    expected = expected_of(path, quant, same["dtype"])
    plan = dq.plan(path, **same, device_map=split(devices), staging=staging)
    _sim.set_cost(50e9, 6e9, seconds)
    model = load_shard(plan, SoloComm(), "sim:1" if devices == 1 else "sim:0")
    found = {"equal": dq.fingerprint(model) == expected, "faults": faults()}
    if asks:
        _sim.set_cost(50e9, 6e9, 1e-6)
        found["answers"] = closeness(
            answers(model, "sim:1" if devices == 1 else "sim:0"), answers(on_the_cpu(path, **same), "cpu")
        )
    del model
    gc.collect()
    return {**found, "still pinned": len(_sim.registered())}


def closeness(one: tuple[list[float], list[int]], other: tuple[list[float], list[int]]) -> tuple[bool, bool]:
    """True where logits are those of the other within rounding, and where tokens are equal."""
    return bool(torch.allclose(torch.tensor(one[0]), torch.tensor(other[0]), atol=1e-3, rtol=1e-3)), one[1] == other[1]


def on_the_cpu(path: str, **options: Any) -> Any:
    """A model on the CPU; `dq.load` would take the simulated device."""
    return load_shard(dq.plan(path, **options), SoloComm(), "cpu")


@functools.cache
def expected_of(path: str, quant: str, dtype: str) -> str:
    """The fingerprint of a load on the CPU, made once."""
    return dq.fingerprint(on_the_cpu(path, quantization_config=quant, dtype=dtype))


def on_ranks(
    path: str, quant: Any, mesh: str, per_node: int, staging: str, seconds: float, asks: bool
) -> dict[str, Any]:
    """Ranks on threads, with a device each."""
    import _sim

    same = {"quantization_config": quant, "dtype": "float32" if asks else "auto"}
    expected = expected_of(path, quant, same["dtype"])
    plan = dq.plan(path, **same, mesh=mesh, ranks_per_node=per_node, staging=staging)
    _sim.set_cost(50e9, 6e9, seconds)

    def rank(comm: ThreadComm, on_cpu: bool = False) -> Any:
        device = "cpu" if on_cpu else f"sim:{comm.rank}"
        torch.accelerator.set_device_index(comm.rank)
        model = load_shard(plan, comm, device)
        found = dq.fingerprint(model)
        if not asks:
            return found, None
        _sim.set_cost(50e9, 6e9, 1e-6)
        return found, answers(model, device)

    found = on_threads(plan.mesh, rank)
    gc.collect()
    result = {"equal": {each for each, _ in found} == {expected}, "faults": faults()}
    if asks:  # the same mesh on CPUs: some methods quantize activations, and ranks round parts of them
        wanted = on_threads(plan.mesh, functools.partial(rank, on_cpu=True))
        result["answers"] = {closeness(one, other) for (_, one), (_, other) in zip(found, wanted, strict=True)}
    return {**result, "still pinned": len(_sim.registered())}
