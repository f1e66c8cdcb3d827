"""The fingerprint of an assembled model: every rank tallies what it owns, and the sums are added up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from distquant.assemble.experts import Experts
from distquant.assemble.local import shard_of
from distquant.errors import InputError
from distquant.planning.experts import expert_name, one_of
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.skeleton import STAR
from distquant.skeleton.experts import form_of
from distquant.tally import LANES, Tally, combine


def fingerprint(model: Any) -> str:
    """32 hex digits that are equal exactly if all codes and scales are; see `distquant.tally`.

    On a sharded model all ranks must call it, and all get the same answer. Replicas (dp) and repeated rows count once.

    Args:
        model: as `distquant.load` returned it, also after `generate`, training steps of adapters, or PEFT's wrapping.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    loaded = model.distquant
    plan, scheme, comm = loaded.plan, loaded.scheme, loaded.comm
    at = plan.mesh.coordinates(comm.rank)
    if scheme.delegated:
        what = f"transformers loaded the model with its own quantizer for {scheme.config.quant_method!r}"
        raise InputError.one("fingerprint", what, "Only weights that distquant quantizes or cuts have a fingerprint")
    lanes = [0] * LANES
    if at["dp"] == 0:
        for tensor in plan.tensors:
            if tensor.experts is not None:
                found = _experts(model, tensor, plan, at)
                lanes = [a + b for a, b in zip(lanes, found, strict=True)]
                continue
            if at["ep"] > 0:
                continue
            tally = Tally(tensor.name)
            module = _original(model, tensor.name.rpartition(".")[0])
            if at["tp"] == 0:
                tally.constant(f"{tensor.scheme} {list(tensor.shape)} {tensor.dtype}")
            if tensor.scheme != "none" and not plan.dequantize:
                scheme.tally(module, shard_of(tensor, plan, at["tp"]), tally)
            else:
                _tally_plain(module, tensor, plan, at["tp"], tally)
            lanes = [a + b for a, b in zip(lanes, tally.lanes, strict=True)]
    return combine(comm.collect(lanes))


def _experts(model: Any, stack: TensorPlan, plan: LoadPlan, at: dict[str, int]) -> list[int]:
    """The part of the fingerprint of this rank's experts of one stack; each counts as a module of its own."""
    owner, _, path = stack.name.partition(f".{STAR}.")
    name = path.partition(".")[0]
    module = model.get_submodule(owner)
    if not isinstance(module, Experts):  # its own module again, after `dequantize`
        shapes = {leaf: tuple(value.shape) for leaf, value in module.named_parameters(recurse=False)}
        form = form_of(owner, module, shapes)
        assert form is not None
        module = Experts.around(module, form, plan.cuts[plan.experts[owner].dealt])
    one, lanes = one_of(stack), [0] * LANES
    for number in range(module.first, module.last):
        tensor = replace(one, name=expert_name(stack.name, number))
        tally = Tally(tensor.name)
        if at["tp"] == 0:
            tally.constant(f"{tensor.scheme} {list(tensor.shape)} {tensor.dtype}")
        if path in module.plain:
            cut = plan.cuts[tensor.cut].owned(at["tp"]) if tensor.cut else None
            _tally_value(module.plain_value(path, number - module.first), cut, tensor.dim, at["tp"], tally)
        else:
            shard = shard_of(tensor, plan, at["tp"])
            for stream, values, span in module.stack(name).scheme.streams(
                shard, module.stack(name).components(number - module.first)
            ):
                tally.shard(stream, values, shard.shape, shard.dim, shard.owned, span=span)
        lanes = [a + b for a, b in zip(lanes, tally.lanes, strict=True)]
    return lanes


def _original(model: Any, path: str) -> Any:
    """The loaded module at a path, below an adapter that may have taken its place."""
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module)


def _tally_plain(module: Any, tensor: Any, plan: Any, rank: int, tally: Tally) -> None:
    leaf = tensor.name.rpartition(".")[2]
    value = module._parameters.get(leaf)
    value = module._buffers[leaf] if value is None else value
    if value.is_meta:  # on the disk, under accelerate's hook
        value = module._hf_hook.weights_map[leaf]
    _tally_value(value, plan.cuts[tensor.cut].owned(rank) if tensor.cut else None, tensor.dim, rank, tally)


def _tally_value(value: Tensor, owned: Any, dim: int | None, rank: int, tally: Tally) -> None:
    """Counts a plain tensor: the segments that this position on tp owns, or all of it on the first."""
    if owned is not None:
        assert dim is not None
        tally.tensor(value, owned, dim)
    elif rank == 0:
        whole = value.shape[0] if value.dim() else 1
        tally.tensor(value, (((0, whole), 0),), 0)
