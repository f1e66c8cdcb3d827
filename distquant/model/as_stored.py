"""A skeleton as a quantized checkpoint stores it, where the method is left out (`on_unsupported="skip"`).

Nothing is known here of a method's format. Weights of the model's shapes keep their places, in the dtype that they are
stored in. Where a weight is stored in another shape, or as tensors of other names, these take its place as they are:
nothing can tell how to cut them, so every rank holds them whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from distquant.checkpoint import TensorInfo
from distquant.dtypes import TORCH_NAMES
from distquant.model.description import ModelDescription, Param, Source

FLOATS = {"F64", "F32", "F16", "BF16"}
"""Checkpoint dtypes that need no scheme to be read."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What was found quantized.

    Attributes:
        weights: parameters that are planned in the form in which the method stores them.
        beside: checkpoint tensors beside those weights that only the method can use (scales, say); left out.
    """

    weights: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def as_stored(description: ModelDescription, tensors: Mapping[str, TensorInfo]) -> tuple[ModelDescription, Kept]:
    """The skeleton with the checkpoint's own dtypes and packed tensors, and what of it is quantized.

    Args:
        skeleton: as `describe_model` returns it.
        tensors: the checkpoint's headers.
    """
    kept = _in_their_places(description, tensors)
    owners = {_owner(source.tensor) for name in kept for source in description.sources[name]}
    beside = tuple(name for name in description.unexpected if _owner(name) in owners)
    unplaced = [name for name in description.unexpected if _owner(name) not in owners]
    inside = _instead_of_missing(description, unplaced)
    weights = {
        name for name in description.missing if _owner(name) in inside.values() and _is_weight(description, name)
    }
    instead = {name: Param(name, tensors[name].shape, _dtype(tensors[name], "float32")) for name in inside}
    packed = {_owner(name) for name, param in kept.items() if param.shape != description.params[name].shape}
    params = {name: kept.get(name, param) for name, param in description.params.items() if name not in weights}
    found = replace(
        description,
        params=params | instead,
        sources=description.sources | {name: (Source(name),) for name in inside},
        unexpected=tuple(name for name in unplaced if name not in inside),
        missing=tuple(name for name in description.missing if name not in weights),
        linears={n: linear for n, linear in description.linears.items() if n not in packed.union(inside.values())},
    )
    return found, Kept((*kept, *inside), beside)


def _in_their_places(description: ModelDescription, tensors: Mapping[str, TensorInfo]) -> dict[str, Param]:
    """Weights whose tensors the model has a place for, with the dtype and the shape in which they are stored."""
    kept = {}
    for name, sources in description.sources.items():
        param, infos = description.params[name], [tensors[source.tensor] for source in sources]
        if param.dtype.startswith(("float", "bfloat")) and any(info.dtype not in FLOATS for info in infos):
            same = len({info.dtype for info in infos}) == 1
            other = len(infos) == 1 and math.prod(infos[0].shape) != math.prod(param.shape)
            shape = infos[0].shape if other else param.shape
            kept[name] = replace(param, shape=shape, dtype=_dtype(infos[0], param.dtype) if same else param.dtype)
    return kept


def _instead_of_missing(description: ModelDescription, unplaced: Iterable[str]) -> dict[str, str]:
    """Tensors inside a module that lacks a weight -> the module: they are what the weight is stored as."""
    lacking = {_owner(name) for name in description.missing if _is_weight(description, name)}
    found = {}
    for name in unplaced:
        module = _owner(name)
        while module and module not in lacking:
            module = _owner(module)
        if module:
            found[name] = module
    return found


def _is_weight(description: ModelDescription, name: str) -> bool:
    return len(description.params[name].shape) > 1


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _dtype(info: TensorInfo, otherwise: str) -> str:
    """Returns torch's name; for a dtype that is not loaded, the model's, which is wider."""
    return TORCH_NAMES.get(info.dtype, otherwise)
