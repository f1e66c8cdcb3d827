"""LoRA on sharded modules: PEFT replaces a module after loading, and its two small matrices then communicate, too.

PEFT brings tensor-parallel hooks of its own only for models that transformers itself sharded as DTensors. Without any,
LoRA on a row-parallel layer adds an unreduced local product to a reduced result, unnoticed while `lora_B` is zero. So
the parent of every sharded module checks, before it runs, if its child was replaced, and installs hooks on adapters:

column-parallel: `lora_A` is replicated, `lora_B` holds this rank's outputs; the gradient into `lora_A` is summed.
row-parallel: `lora_A` holds this rank's inputs, and its product is summed; `lora_B` is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distquant.errors import DistquantError
from distquant.parallel.comm import Axis
from distquant.parallel.tensor_parallel import CheckDropout, CopyInput, GatherOutput, ReduceOutput, SplitInput
from distquant.planning.load_plan import LoadPlan
from distquant.planning.tensor_parallel import COLWISE, COLWISE_GATHER, ROWWISE, ROWWISE_SPLIT, VOCAB_EMBEDDING
from distquant.sharding.partition import Partition

WIRED = "_distquant_wired"


class AdapterError(DistquantError, RuntimeError):
    """An adapter on a sharded module that would compute something else."""


@dataclass
class _Watch:
    """Hook of a parent: connects adapters on its sharded children."""

    model: Any
    axis: Axis
    children: dict[str, tuple[nn.Module, str, Partition]] = field(default_factory=dict)
    """Path from the parent -> the module that was loaded, its style and its partition."""

    def __call__(self, parent: nn.Module, args: Any) -> None:
        for path, (loaded, style, partition) in self.children.items():
            child = parent.get_submodule(path) if "." in path else getattr(parent, path)
            if child is not loaded:
                _wire(path, child, style, partition, self.axis, getattr(self.model, "peft_config", {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self


def watch_adapters(model: nn.Module, plan: LoadPlan, axis: Axis) -> None:
    """Makes every parent of a sharded module connect adapters that PEFT puts there."""
    root = getattr(model, "base_model", model)
    watches: dict[str, _Watch] = {}
    for name, shard in plan.modules.items():
        if shard.style in (COLWISE, COLWISE_GATHER, ROWWISE, ROWWISE_SPLIT, VOCAB_EMBEDDING):
            parent, _, leaf = name.rpartition(".")
            watch = watches.setdefault(parent, _Watch(model, axis))
            watch.children[leaf] = (model.get_submodule(name), shard.style, plan.partitions[shard.partition])
    for parent, watch in watches.items():
        owner = model.get_submodule(parent)
        if owner is model:
            # PEFT calls the outermost model's `forward` itself, past its hooks; the base model inside is called.
            root.register_forward_pre_hook(_RunFor(model, watch))
        else:
            owner.register_forward_pre_hook(watch)


@dataclass
class _RunFor:
    """Hook of a module that runs the watch of another."""

    parent: nn.Module
    watch: _Watch

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.watch(self.parent, args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _RunFor:
        return self


def _wire(
    path: str, child: nn.Module, style: str, partition: Partition, axis: Axis, configs: Mapping[str, Any]
) -> None:
    if hasattr(child, "modules_to_save"):
        return  # a full copy of the module, hooks included
    if not hasattr(child, "lora_A") or not hasattr(child, "base_layer"):
        raise AdapterError(
            f"{path} was replaced by {type(child).__name__}; on a sharded module only PEFT's LoRA is supported"
        )
    lora: Any = child
    for adapter in (*lora.lora_A.keys(), *lora.lora_embedding_A.keys()):
        # The matrix itself is marked: another adapter may come under the same name.
        marks = lora.lora_A[adapter].__dict__ if adapter in lora.lora_A else {}
        if WIRED not in marks:
            _check(path, child, adapter, style, partition, configs.get(adapter))
            if isinstance(lora.lora_dropout[adapter], nn.Dropout):  # else an identity
                lora.lora_dropout[adapter].register_forward_pre_hook(CheckDropout(f"{path}.lora_dropout"))
            _wire_one(lora.lora_A[adapter], lora.lora_B[adapter], style, partition, axis)
            marks[WIRED] = True


def _check(path: str, child: Any, adapter: str, style: str, partition: Partition, config: Any) -> None:
    if style == VOCAB_EMBEDDING:
        raise AdapterError(
            f"{path}: LoRA on a vocabulary-parallel embedding is not supported; leave it out of the targets"
        )
    initial = getattr(config, "init_lora_weights", True)
    if not isinstance(initial, bool) and str(initial).lower() != "gaussian":
        raise AdapterError(
            f"{path}: init_lora_weights={initial!r} computes initial values from the whole weight or for all ranks, "
            "but each rank has a part; load the model again (its weights may have changed) and use True or 'gaussian'"
        )
    if not isinstance(child.lora_A[adapter], nn.Module):
        raise AdapterError(
            f"{path}: on a sharded module only PEFT's plain LoRA is supported, not {type(child).__name__}"
        )
    if getattr(child, "use_dora", {}).get(adapter) or getattr(child, "lora_variant", {}).get(adapter) is not None:
        raise AdapterError(f"{path}: only plain LoRA is supported on sharded modules (no DoRA or other variants)")
    if partition.repeated:
        raise AdapterError(
            f"{path}: its kv heads are repeated over ranks, their LoRA copies would drift apart; "
            "leave k_proj and v_proj out of the targets or use a smaller tp"
        )


def _wire_one(lora_a: nn.Module, lora_b: nn.Module, style: str, partition: Partition, axis: Axis) -> None:
    """Installs the hooks of one adapter: those of its module's style, on the matrix that is sharded as that is."""
    if style in (COLWISE, COLWISE_GATHER):
        replicated = lora_a
        lora_b.register_forward_pre_hook(CopyInput(axis))
        if style == COLWISE_GATHER:
            lora_b.register_forward_hook(GatherOutput(axis, partition.lengths))
    else:
        replicated = lora_b
        if style == ROWWISE_SPLIT:
            lora_a.register_forward_pre_hook(SplitInput(axis, partition.lengths))
        lora_a.register_forward_hook(ReduceOutput(axis), always_call=True)
    with torch.no_grad():
        for parameter in replicated.parameters():
            # Ranks may have drawn different initial values, and gradients keep copies equal only if they start equal.
            axis.broadcast(parameter.data)
