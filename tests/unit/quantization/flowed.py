"""A scheme's module as a rank fills it: from rows of the whole weight, and of what they become its shard's part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distquant.kernels.choice import choose
from distquant.quantization import Scheme, Shard

OPS = choose("auto", torch.device("cpu")).ops


def filled(scheme: Scheme, shard: Shard, weight: Tensor, step: int) -> Any:
    """A shard's module, from rows of the whole weight that come `step` at a time."""
    components = scheme.encoded_components(shard.name, shard.shape, shard.dtype)
    whole = {c.name: torch.empty(c.shape(shard.shape), dtype=getattr(torch, c.dtype)) for c in components}
    for at in range(0, len(weight), step):
        out = {name: value[at : at + step].view(-1) for name, value in whole.items()}
        scheme.encode(shard.name, weight[at : at + step], out, OPS)
    parts = {}
    for component in components:
        value = whole[component.name]
        for dim, segments in enumerate((shard.rows, shard.columns)):
            if component.name not in scheme.replicated_components(shard) and not (dim == 1 and value.shape[1] == 1):
                span = max(component.block_shape[dim], 1)
                value = torch.cat([value.narrow(dim, a // span, -(-b // span) - a // span) for a, b in segments], dim)
        parts[component.name] = value.contiguous().view(-1)
    module = scheme.module(nn.Linear(4, 4, bias=False), shard)
    scheme.load_encoded(shard, module, parts, OPS)
    return module


def same(a: Tensor, b: Tensor) -> bool:
    """Whether dtypes and bits are equal; a size of 1 may be there or not."""
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
