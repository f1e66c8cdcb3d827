"""The parameters that hqq stores beside a weight's codes, scales and zeros: how the weight was quantized.

`HQQLinear.state_dict` writes each as a tensor (`encode_safetensor_type`, hqq 0.2.8): integers as int32, flags as uint8,
a shape as int64, and texts as the codes of their letters. Those that decide what the codes mean must be what the
configuration and the model say. The others change nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from distquant.errors import Problem
from distquant.quantization.algorithms.hqq_groups import Groups
from distquant.quantization.stored_checks import misshapen

CONSTANTS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise",
    "optimize", "round_zero",
)  # fmt: skip
"""Their names."""

PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
"""Bits of a code -> name of its packing (`Quantizer.bit_to_packing`)."""


def meant(groups: Groups, shape: tuple[int, ...]) -> dict[str, list[int]]:
    """Values that the deciding parameters of a weight must have, each as a flat list."""
    return {
        "nbits": [groups.bits],
        "group_size": [groups.size],
        "axis": [groups.axis],
        "shape": list(shape),
        "view_as_float": [0],
        "quant_scale": [0],
        "quant_zero": [0],
        "packing": list(PACKINGS[groups.bits].encode()),
    }


def size_problems(
    name: str, meant: Mapping[str, list[int]], stored: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    """Yields the parameters that are stored with another number of elements."""
    for component, value in meant.items():
        if component in stored and math.prod(stored[component]) != len(value):
            yield misshapen(name, component, stored[component], (len(value),))


def value_problems(name: str, meant: Mapping[str, list[int]], parts: Mapping[str, Tensor]) -> Iterator[Problem]:
    """Yields the parameters that are stored with another value."""
    for component, value in meant.items():
        stored = parts[component].tolist() if component in parts else value
        if stored != value:
            fault = f"{component} is stored as {stored}, the configuration means {value}"
            yield Problem(name, fault, "Check that config.json belongs to the checkpoint")
