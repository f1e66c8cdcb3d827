"""Gives modules their local size: quantized linears become the scheme's modules, sharded ones shrink, heads fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from distquant.model import STAR
from distquant.model.build import reads_heads_from_config
from distquant.model.experts import form_of
from distquant.model.uninitialized import Uninitialized
from distquant.parallel.expert_stack import ExpertStack
from distquant.parallel.experts import LocalExperts
from distquant.planning.expert_parallel import expert_name, first_expert
from distquant.planning.load_plan import LoadPlan, TensorPlan
from distquant.quantization import ModuleFactory, QuantizedScheme, Scheme, Shard

QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def shard_of(tensor: TensorPlan, plan: LoadPlan, tp_rank: int) -> Shard:
    """Returns a rank's part of a linear weight."""
    partition = plan.partitions[tensor.partition] if tensor.partition else None
    return Shard(tensor.name, (tensor.shape[0], tensor.shape[1]), tensor.dtype, tensor.shard_dim, partition, tp_rank)


def local_shape(tensor: TensorPlan, plan: LoadPlan, tp_rank: int) -> tuple[int, ...]:
    """Returns the shape that a rank stores of a parameter."""
    shape = list(tensor.shape)
    if tensor.partition is not None and tensor.shard_dim is not None:
        shape[tensor.shard_dim] = plan.partitions[tensor.partition].length(tp_rank)
    return tuple(shape)


def shard_experts(model: nn.Module, plan: LoadPlan, scheme: Scheme, tp_rank: int, ep_rank: int = 0) -> None:
    """Replaces modules of experts on `meta` for this rank, before anything is read, which goes directly there."""
    for name in plan.experts:
        model.set_submodule(name, _experts(model.get_submodule(name), name, plan, ep_rank))
    for tensor in plan.tensors:
        if tensor.experts is not None:
            owner = tensor.name.partition(f".{STAR}.")[0]
            _add_stack(model.get_submodule(owner), tensor, plan, scheme, tp_rank)


def shard_modules(model: nn.Module, plan: LoadPlan, scheme: Scheme, tp_rank: int) -> None:
    """Replaces and resizes all other modules on `meta` for this rank. Weights are placed later."""
    for tensor in plan.tensors:
        if tensor.experts is not None:
            continue
        owner, _, leaf = tensor.name.rpartition(".")
        if tensor.scheme != "none" and not plan.dequantize:
            assert isinstance(scheme, ModuleFactory), "no other scheme converts modules"
            old = model.get_submodule(owner)
            with Uninitialized():
                new = scheme.module(old, shard_of(tensor, plan, tp_rank))
            new.__dict__["source_cls"] = type(old)  # transformers' saving and dequantizing look at it
            model.set_submodule(owner, new.requires_grad_(False).train(old.training))
        elif tensor.partition is not None:
            shape = local_shape(tensor, plan, tp_rank)
            module = model.get_submodule(owner)
            _resize(module, leaf, shape[::-1] if stored_transposed(module, tensor) else shape)
    for name, attention in plan.attentions.items():
        heads = plan.heads[attention.heads]
        _set_heads(
            model.get_submodule(name), heads.query.length(tp_rank), heads.kv.length(tp_rank), heads.groups[tp_rank]
        )


def _experts(original: nn.Module, name: str, plan: LoadPlan, ep_rank: int) -> LocalExperts:
    """Returns an empty module for this rank's experts, to replace the model's own."""
    shapes = {leaf: tuple(parameter.shape) for leaf, parameter in original.named_parameters(recurse=False)}
    form = form_of(name, original, shapes)
    assert form is not None, "the planner splits experts of known form only"
    module = LocalExperts(original, form, plan.partitions[plan.experts[name].ep_partition], ep_rank)
    module.__dict__["source_cls"] = type(original)
    return module.train(original.training)


def _add_stack(module: Any, tensor: TensorPlan, plan: LoadPlan, scheme: Scheme, tp_rank: int) -> None:
    """Adds the target of one entry of the plan: a stack of components, or a plain parameter (a part of one)."""
    _, _, path = tensor.name.partition(f".{STAR}.")
    name, leaf = path.split(".")
    projection = next(p for p in module.form.projections if p.name == name)
    one = first_expert(tensor)
    if tensor.scheme != "none" and not plan.dequantize:
        assert isinstance(scheme, QuantizedScheme), "no other scheme has `stacks`"
        numbers = range(module.first, module.last)
        shards = [shard_of(replace(one, name=expert_name(tensor.name, n)), plan, tp_rank) for n in numbers]
        module.add_stack(name, ExpertStack(scheme, shards))
        return
    parameter = projection.parameter + ("" if leaf == "weight" else "_bias")
    module.add_plain(path, parameter, local_shape(one, plan, tp_rank), getattr(torch, tensor.dtype))


def stored_transposed(module: nn.Module, tensor: TensorPlan) -> bool:
    """Returns True if a dequantized weight is `[in, out]` in its module (GPT-2's Conv1D)."""
    return tensor.scheme != "none" and type(module).__name__ == "Conv1D"


def _resize(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> None:
    old = module._parameters[leaf]
    assert old is not None
    empty = torch.empty(shape, dtype=old.dtype, device="meta")
    module._parameters[leaf] = nn.Parameter(empty, requires_grad=old.requires_grad)
    if leaf != "weight":
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = shape[0]
        module.padding_idx = None  # only shields a gradient; the id is on one rank


def _set_heads(attention: nn.Module, query: int, kv: int, groups: int) -> None:
    """Makes an attention module count its local heads. The shared config is never changed."""
    for names, value in ((QUERY_HEADS, query), (KV_HEADS, kv), (("num_key_value_groups",), groups)):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, value)
    if reads_heads_from_config(attention):
        attention.__dict__["config"] = _HeadsView(attention.config, query, kv)


class _HeadsView:
    """A config that answers with local head counts, and for everything else with the shared config as it is then."""

    def __init__(self, shared: Any, query: int, kv: int):
        self._shared = shared
        self.num_attention_heads = query
        self.num_key_value_heads = kv

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_shared":
            raise AttributeError(name)
        return getattr(self._shared, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _HeadsView:
        return _HeadsView(copy.deepcopy(self._shared, memo), self.num_attention_heads, self.num_key_value_heads)


def set_tensor(model: nn.Module, name: str, value: Tensor, tied: Mapping[str, str]) -> None:
    """Puts a finished parameter or buffer into the model, and wherever it is tied to."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return
    old = module._parameters[leaf]
    parameter = nn.Parameter(value, requires_grad=value.is_floating_point() and bool(old is None or old.requires_grad))
    module._parameters[leaf] = parameter
    for target, source in tied.items():
        if source == name:
            sharer, _, sharer_leaf = target.rpartition(".")
            model.get_submodule(sharer)._parameters[sharer_leaf] = parameter
