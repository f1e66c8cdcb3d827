"""Modules and models that keep weights in the layouts of GPTQ and AWQ, for tests of what multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from packed_words import Kind, make_weight

import distquant as dq
from distquant.config import AutoRoundConfig, AwqConfig, GptqConfig
from distquant.quantization import Shard, scheme_for
from distquant.quantization.linear.quantized_linear import QuantizedLinear
from distquant.quantization.packed_int import PackedIntScheme
from distquant.sharding.partition import Partition

CPU = torch.device("cpu")
SHAPE = (64, 128)
IDS = torch.tensor([[3, 17, 5, 40, 8, 2, 11, 29]])
RTN = {"quant_method": "gptq", "bits": 4, "group_size": 32}


def scheme_of(kind: Kind) -> PackedIntScheme:
    cls = {"gptq": GptqConfig, "awq": AwqConfig, "auto-round": AutoRoundConfig}[kind.method]
    found = scheme_for(cls.from_dict(kind.config([])))
    assert isinstance(found, PackedIntScheme)
    return found


def module_of(kind: Kind, dtype: str = "bfloat16", dim: int | None = None, rank: int = 0) -> QuantizedLinear:
    """A filled module; with `dim` one of two ranks' part of it."""
    scheme, stored = scheme_of(kind), make_weight(SHAPE, kind, 1, torch.float16)
    partition = (
        None if dim is None else Partition(SHAPE[dim], (((0, SHAPE[dim] // 2),), ((SHAPE[dim] // 2, SHAPE[dim]),)))
    )
    shard = Shard("m.weight", SHAPE, dtype, dim, partition, rank)
    parts = {}
    for component in scheme.layout(shard.name, SHAPE, dtype).components:
        whole = stored[component.name]
        if partition is not None:
            start, stop = partition.segments(rank)[0]
            if component.name == "g_idx":
                whole = whole[start:stop] if dim == 1 else whole
            elif (found := component.slice(SHAPE, dim, start, stop)) is not None:
                whole = whole.narrow(found[0], found[1], found[2] - found[1])
        parts[component.name] = whole.contiguous().view(-1)
    module = QuantizedLinear(scheme, shard, None)
    module.take(scheme.pack_prequantized(shard, parts, frozenset()))
    return module


def inputs(module: QuantizedLinear, seed: int = 0) -> torch.Tensor:
    made = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(seed))
    return made.to(getattr(torch, module.shard.dtype))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def loaded(path: str, forward: str, quant: Any = RTN, **more: Any) -> Any:
    return dq.load(path, quantization_config=quant, forward=forward, **{"dtype": "bfloat16", **more})
