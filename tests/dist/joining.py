"""What ranks do in the tests of how they join: groups that exist before, timeouts, and attention weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import work
from torch import Tensor
from work import error_of, exact, rank

import distquant as dq


def store() -> Any:
    return dist.distributed_c10d._get_default_store()


def waiting_alone(path: str, mesh: str, timeout: float) -> str:
    """What rank 0 is told when it alone asks the model; the others wait until it is."""
    model = dq.load(path, quantization_config="nf4", mesh=mesh, timeout=timeout)
    if rank() != 0:
        store().wait(["told"])
        return ""
    error = error_of(model, torch.tensor(work.IDS))
    store().set("told", "1")
    return str(error)


def collecting_alone(path: str, mesh: str, timeout: float) -> str:
    """As `waiting_alone`, where all ranks exchange objects."""
    model = dq.load(path, quantization_config="nf4", mesh=mesh, timeout=timeout)
    if rank() != 0:
        store().wait(["told"])
        return ""
    error = error_of(model.distquant.comm.collect, 1)
    store().set("told", "1")
    return str(error)


def own_timeout(path: str, mesh: str, timeouts: list[float | None]) -> str:
    return str(error_of(dq.load, path, mesh=mesh, timeout=timeouts[rank()]))


def without_mesh(path: str) -> str:
    return str(error_of(dq.load, path))


def attention_weights(path: str, mesh: str | None, how: str) -> list[Tensor]:
    """Weights `[batch, heads, queries, keys]` of all layers, asked for in one of several ways."""
    model: Any = dq.load(path, mesh=mesh, dtype="float32", attn_implementation="eager")
    ids = torch.tensor(work.IDS)
    with torch.no_grad():
        if how == "generate":
            kwargs = {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True}
            steps = model.generate(ids, output_attentions=True, **kwargs).attentions
            return [weights for step in steps for weights in step]
        if how == "config":
            model.config.output_attentions = True
            return list(model(ids).attentions)
        if how == "tuple":
            return list(model(ids, output_attentions=True, return_dict=False)[-1])
        if how == "base":
            return list(model.base_model(ids, output_attentions=True).attentions)
        return list(model(ids, output_attentions=True).attentions)


def gradient_of_weights(path: str, mesh: str | None) -> Tensor:
    """The gradient of the embedded tokens, of a loss over attention weights: every head's counts."""
    model: Any = dq.load(path, mesh=mesh, dtype="float32", attn_implementation="eager")
    inputs = model.get_input_embeddings()(torch.tensor(work.IDS)).detach().requires_grad_(True)
    found = model(inputs_embeds=inputs, output_attentions=True).attentions
    sum((weights * weights).sum() * (layer + 1) for layer, weights in enumerate(found)).backward()
    assert inputs.grad is not None
    return inputs.grad


def reductions_of_a_forward(path: str, asked: bool) -> int:
    """Collectives that gather in one forward."""
    model: Any = exact(path, "none", "tp=2")
    model.set_attn_implementation("eager")
    axis, count = model.distquant.comm.axis("tp"), 0
    gather = type(axis).all_gather

    def counted(self: Any, *args: Any) -> Tensor:
        nonlocal count
        count += 1
        return gather(self, *args)

    type(axis).all_gather = counted
    try:
        model(torch.tensor(work.IDS), output_attentions=asked)
    finally:
        type(axis).all_gather = gather
    return count
