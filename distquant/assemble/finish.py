"""The last steps: real values for buffers that no file holds, ties, and the proof that nothing was left out."""

from __future__ import annotations

import types
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distquant.comm import Axis
from distquant.errors import DistquantError, InputError


class IncompleteModel(DistquantError, RuntimeError):
    """A parameter or buffer was not filled, or filled twice: a bug in distquant, not in the checkpoint."""


def fill_computed_buffers(model: Any, device_of: Any) -> None:
    """Gives non-persistent buffers (`inv_freq` and its like) their values, by the model's own initialization."""
    for tensor in (*model.parameters(), *(b for _, b in model.named_buffers())):
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty_like(buffer, device=device_of(name))
    with torch.no_grad():
        model._initialize_missing_keys(is_quantized=True)


def finish(model: Any, path: str, axis: Axis, sharded: bool) -> None:
    """Names, mode and, on a sharded model, the methods that must know of the other ranks.

    Args:
        model: the filled model.
        path: what it was loaded from.
        axis: the ranks that are given the same tokens.
        sharded: whether other ranks hold parts of it, or experts are held in a form of their own.
    """
    model.name_or_path = model.config.name_or_path = path
    model.eval()
    if sharded:
        model.save_pretrained = types.MethodType(_refuse_save, model)
    if axis.size > 1:
        model.generate = types.MethodType(_Generate(axis), model)


SHARDED = "the model is sharded, every rank would write its part as if it were the whole weight"
STACKED = "its experts are held as stacks of quantized components, under names that transformers would not load again"
KEEP = "Keep the checkpoint that it was loaded from"


def _refuse_save(model: Any, *_: Any, **__: Any) -> None:
    stacked = model.distquant.plan.mesh.ep * model.distquant.plan.mesh.tp == 1
    what, fix = (STACKED, KEEP) if stacked else (SHARDED, "Load it with tp=1 to save it")
    raise InputError.one("save_pretrained", what, fix)


@dataclass(frozen=True)
class _RefuseFormat:
    """`save_pretrained` of a whole model in a form that `from_pretrained` does not read."""

    reason: str

    def __call__(self, *_: Any, **__: Any) -> None:
        fix = f"{KEEP}: loaded with the same quantization_config it gives the same bits"
        raise InputError.one("save_pretrained", self.reason, fix)


def refuse_format(model: Any, reason: str | None) -> None:
    """Makes `save_pretrained` raise before it writes, where there is a reason and nothing else makes it raise."""
    if reason is not None and "save_pretrained" not in model.__dict__:
        model.save_pretrained = _RefuseFormat(reason)


class _Generate:
    """`generate` with one random state over the ranks, so that they sample the same tokens: rank 0's."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        torch.set_rng_state(self.axis.broadcast(state))
        if model.device.type == "cuda":
            on_device = torch.cuda.get_rng_state(model.device)
            torch.cuda.set_rng_state(self.axis.broadcast(on_device.to(model.device)).cpu(), model.device)
        return type(model).generate(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
        return self


def check_complete(model: nn.Module, filled: list[str], expected: list[str], elsewhere: set[str]) -> None:
    """Every planned tensor was filled exactly once, and nothing is left on `meta` but what lies on disk."""
    counts = Counter(filled)
    wrong = [f"{name} ({counts[name]} times)" for name in expected if counts[name] != 1]
    wrong += [f"{name} (not planned)" for name in counts.keys() - set(expected)]
    tensors = (*model.named_parameters(), *model.named_buffers())
    wrong += [f"{name} (on meta)" for name, tensor in tensors if tensor.device.type == "meta" and name not in elsewhere]
    if wrong:
        raise IncompleteModel(f"{len(wrong)} tensors are not filled exactly once: {', '.join(wrong[:5])}")
