"""Stored components of one weight in compressed-tensors' format: their shapes, their checks, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distquant.dtypes import STORED_NAMES
from distquant.errors import InputError
from distquant.quantization.methods.compressed_tensors.rounding import from_words, spread
from distquant.quantization.methods.compressed_tensors.storage import Storage
from distquant.quantization.stored_checks import OTHER_CHECKPOINT, SCALE_DTYPES
from distquant.quantization.stored_values import FINITE, MAGNITUDES, Check, integers_of
from distquant.sharding.shard import Shard

SHAPE, GROUPS = "weight_shape", "weight_g_idx"


def dtypes_of(storage: Storage, components: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Safetensors' dtypes that each of these components may have."""
    allowed = {storage.codes: (STORED_NAMES[storage.dtype],), SHAPE: ("I64", "I32"), GROUPS: ("I64", "I32")}
    allowed |= dict.fromkeys((each for each in components if each.endswith("_scale")), SCALE_DTYPES)
    # Symmetric weights may have zero points beside them, which must be 0: any dtype says that.
    if not storage.weights.symmetric:
        allowed["weight_zero_point"] = ("I32",) if storage.packed_zero else ("I8",)
    return allowed


def check_of(storage: Storage, component: str) -> Check | None:
    """The check of a component's values: scales, and integers of fewer bits than their bytes have."""
    if component.endswith("_scale"):
        return MAGNITUDES if storage.floating and component == "weight_scale" else FINITE
    if storage.floating or storage.weights.num_bits == 8:
        return None
    in_bytes = {"": not storage.packed, "weight_zero_point": not (storage.packed_zero or storage.weights.symmetric)}
    return integers_of(storage.weights.num_bits) if in_bytes.get(component) else None


def check_values(storage: Storage, shard: Shard, parts: Mapping[str, Tensor]) -> None:
    """Checks what headers do not show: statistics that must be trivial.

    Raises:
        InputError: one is not as the configuration says.
    """
    if SHAPE in parts and tuple(parts[SHAPE].tolist()) != shard.shape:
        fault = f"weight_shape says {parts[SHAPE].tolist()}, the model has {list(shard.shape)}"
        raise InputError.one(shard.name, fault, OTHER_CHECKPOINT)
    if GROUPS in parts:
        index, size = parts[GROUPS].long(), storage.weights.group_size or 1
        ordered = torch.arange(len(index), device=index.device) // size
        if not (torch.equal(index, ordered) or bool((index == -1).all())):
            fault = f"{GROUPS} gives columns a group of their own choice, which is not supported"
            raise InputError.one(shard.name, fault, "Quantize the original again with actorder='weight' or none")
    zeros = parts.get("weight_zero_point")
    if storage.weights.symmetric and zeros is not None and bool(zeros.float().any()):
        raise InputError.one(shard.name, "it has zero points, and its group is symmetric", OTHER_CHECKPOINT)


def with_library_shapes(storage: Storage, components: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Components with the shapes that the library gives those of one element."""
    single = {*storage.statics}
    if storage.weights.scope == "tensor":
        single |= {"weight_scale", "weight_zero_point"}
    return {
        name: value.reshape(1) if name in single and math.prod(value.shape) == 1 else value
        for name, value in components.items()
    }


def unpacked(
    storage: Storage, shape: tuple[int, int], components: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes `[rows, columns]`, scales and zero points of tiles, both 2-D, of a weight or shard of that shape."""
    bits, codes = storage.weights.num_bits, components[storage.codes]
    scale, zero = components["weight_scale"], components.get("weight_zero_point")
    scale = scale.view(1, 1) if scale.dim() < 2 else scale
    if zero is not None:
        zero = from_words(zero.T, bits, shape[0]).T.contiguous() if storage.packed_zero else zero.view(scale.shape)
    return from_words(codes, bits, shape[1]) if storage.packed else codes, scale, zero


def by_row(values: Tensor, storage: Storage, shape: tuple[int, int]) -> Tensor:
    """Values of tiles (2-D), one for each row."""
    if storage.tile[0] == 1:
        return values
    return spread(values, (storage.tile[0], 1), shape).expand(shape[0], -1).contiguous()
