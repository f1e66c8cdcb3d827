"""Finishes a model: real values for buffers that no file holds, ties, and a check that nothing is left out."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distquant.errors import DistquantError, InputError
from distquant.model import STAR
from distquant.parallel.comm import Axis
from distquant.parallel.generate import Generate
from distquant.planning.load_plan import LoadPlan
from distquant.process_state import changing_process_state


class IncompleteModel(DistquantError, RuntimeError):
    """Error: a parameter or buffer was not filled, or filled twice. A bug in distquant, not in the checkpoint."""


@changing_process_state()
def fill_computed_buffers(model: Any, device_of: Any) -> None:
    """Gives non-persistent buffers (`inv_freq` and its like) their values, by the model's own initialization."""
    for tensor in (*model.parameters(), *(b for _, b in model.named_buffers())):
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device=device_of(name))
    with torch.no_grad():
        model._initialize_missing_keys(is_quantized=True)


def finish(model: Any, path: str, axis: Axis, sharded: bool, batches: Axis | None = None) -> None:
    """Sets names, mode and, on a sharded model, the methods that must know of the other ranks.

    Args:
        model: the filled model.
        path: of its checkpoint.
        axis: the ranks that are given the same tokens.
        sharded: True if other ranks hold parts of it, or experts are held in a form of their own.
        batches: the ranks that work together on batches of their own.
    """
    model.name_or_path = model.config.name_or_path = path
    model.eval()
    if sharded:
        model.save_pretrained = types.MethodType(_fail_to_save, model)
    if axis.size > 1 or batches is not None:
        model.generate = types.MethodType(Generate(axis, batches), model)
        model.init_continuous_batching = types.MethodType(_fail_to_batch, model)


def _fail_to_batch(model: Any, *_: Any, **__: Any) -> None:
    fault = "continuous batching schedules requests by each rank's own clock, and ranks of a sharded model must agree"
    raise InputError.one("generate_batch", fault, "Use generate with a batch of prompts, or load with tp=1, ep=1")


SHARDED = "the model is sharded, every rank would write its part as if it were the whole weight"
STACKED = "its experts are held as stacks of quantized components, under names that transformers would not load again"
KEEP = "Keep the checkpoint that it was loaded from"


def _fail_to_save(model: Any, *_: Any, **__: Any) -> None:
    stacked = model.distquant.plan.mesh.ep * model.distquant.plan.mesh.tp == 1
    fault, fix = (STACKED, KEEP) if stacked else (SHARDED, "Load it with tp=1 to save it")
    raise InputError.one("save_pretrained", fault, fix)


@dataclass(frozen=True)
class _UnsavableFormat:
    """`save_pretrained` of an unsharded model in a form that `from_pretrained` does not read."""

    reason: str

    def __call__(self, *_: Any, **__: Any) -> None:
        fix = f"{KEEP}: loaded with the same quantization_config it gives the same bits"
        raise InputError.one("save_pretrained", self.reason, fix)


def forbid_saving(model: Any, reason: str | None) -> None:
    """Makes `save_pretrained` raise before it writes, if there is a reason and nothing else makes it raise."""
    if reason is not None and "save_pretrained" not in model.__dict__:
        model.save_pretrained = _UnsavableFormat(reason)


def check_complete(model: nn.Module, filled: list[str], plan: LoadPlan, elsewhere: set[str]) -> None:
    """Checks that the model is complete, and as it was planned.

    Every planned tensor was filled exactly once, nothing is left on `meta` but what is on the disk, and whatever is
    kept unquantized has the planned dtype.

    Raises:
        IncompleteModel: names the tensors that differ.
    """
    counts = Counter(filled)
    expected = [tensor.name for tensor in plan.tensors]
    wrong = [f"{name} ({counts[name]} times)" for name in expected if counts[name] != 1]
    wrong += [f"{name} (not planned)" for name in counts.keys() - set(expected)]
    tensors = (*model.named_parameters(), *model.named_buffers())
    wrong += [f"{name} (on meta)" for name, tensor in tensors if tensor.device.type == "meta" and name not in elsewhere]
    if wrong:
        raise IncompleteModel(f"{len(wrong)} tensors are not filled exactly once: {', '.join(wrong[:5])}")
    other = list(_other_dtypes(model, plan))
    if other:
        raise IncompleteModel(f"{len(other)} tensors have another dtype than planned: {', '.join(other[:5])}")


def _other_dtypes(model: nn.Module, plan: LoadPlan) -> Iterator[str]:
    """Yields unquantized parameters and buffers whose dtype is not the planned one."""
    planned = {t.name: t for t in plan.tensors if t.scheme == "none" or plan.dequantize}
    sharers = {name: planned[source] for name, source in plan.tied.items() if source in planned}
    for name, tensor in (planned | sharers).items():
        owner, _, leaf = name.rpartition(".") if tensor.experts is None else name.partition(f".{STAR}.")
        module: Any = model.get_submodule(owner)
        held = getattr(module, leaf if tensor.experts is None else module.plain[leaf][0])
        if str(held.dtype) != f"torch.{tensor.dtype}":
            yield f"{name} ({held.dtype} in place of {tensor.dtype})"
