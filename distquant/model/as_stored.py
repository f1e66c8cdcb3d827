"""The model description of a quantized checkpoint whose method is left out (`on_unsupported="skip"`).

The method's format is unknown here. Weights of the model's shapes keep their places, in the stored dtype. Weights of
another shape, or stored as tensors of other names, are replaced by the stored tensors. Nothing is known about how to
partition these, so every rank replicates them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from distquant.checkpoint import TensorInfo
from distquant.dtypes import TORCH_NAMES
from distquant.model.description import ModelDescription, Param, Source

PLAIN_FLOATS = {"F64", "F32", "F16", "BF16"}
"""Checkpoint dtypes that are read without a scheme."""


@dataclass(frozen=True, slots=True)
class QuantizedTensors:
    """The quantized tensors of a checkpoint whose method is left out.

    Attributes:
        weights: parameters that are planned in their stored form.
        beside: checkpoint tensors beside those weights that only the method can use (such as scales); left out.
    """

    weights: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def as_stored(
    description: ModelDescription, tensors: Mapping[str, TensorInfo]
) -> tuple[ModelDescription, QuantizedTensors]:
    """Returns the description with the checkpoint's own dtypes and packed tensors, and the quantized ones among them.

    Args:
        description: as `describe_model` returns it.
        tensors: headers of the checkpoint's tensors, by name.
    """
    kept = _in_their_places(description, tensors)
    # A tensor without a place beside a quantized weight is a part of that weight (its scales, for example). Any other
    # may be the stored form of a weight that the model misses.
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
    stored = replace(
        description,
        params=params | instead,
        sources=description.sources | {name: (Source(name),) for name in inside},
        unexpected=tuple(name for name in unplaced if name not in inside),
        missing=tuple(name for name in description.missing if name not in weights),
        linears={n: linear for n, linear in description.linears.items() if n not in packed.union(inside.values())},
    )
    return stored, QuantizedTensors((*kept, *inside), beside)


def _in_their_places(description: ModelDescription, tensors: Mapping[str, TensorInfo]) -> dict[str, Param]:
    """Returns the quantized weights that have a place in the model, with their stored dtype and shape."""
    kept = {}
    for name, sources in description.sources.items():
        param, infos = description.params[name], [tensors[source.tensor] for source in sources]
        if param.dtype.startswith(("float", "bfloat")) and any(info.dtype not in PLAIN_FLOATS for info in infos):
            same = len({info.dtype for info in infos}) == 1
            other = len(infos) == 1 and math.prod(infos[0].shape) != math.prod(param.shape)
            shape = infos[0].shape if other else param.shape
            kept[name] = replace(param, shape=shape, dtype=_dtype(infos[0], param.dtype) if same else param.dtype)
    return kept


def _instead_of_missing(description: ModelDescription, unplaced: Iterable[str]) -> dict[str, str]:
    """Returns tensor -> module, for tensors inside a module that lacks a weight: they are its stored form."""
    lacking = {_owner(name) for name in description.missing if _is_weight(description, name)}
    module_of = {}
    for name in unplaced:
        module = _owner(name)
        while module and module not in lacking:
            module = _owner(module)
        if module:
            module_of[name] = module
    return module_of


def _is_weight(description: ModelDescription, name: str) -> bool:
    return len(description.params[name].shape) > 1


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _dtype(info: TensorInfo, otherwise: str) -> str:
    """Returns torch's name; for a dtype that is not loaded, the model's, which is wider."""
    return TORCH_NAMES.get(info.dtype, otherwise)
