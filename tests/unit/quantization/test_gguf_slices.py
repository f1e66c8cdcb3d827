"""GGUF: slicing stored blocks by the layout, then dequantizing, equals dequantizing, then slicing."""

from __future__ import annotations

import ggufs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distquant.checkpoint.gguf import BLOCKS
from distquant.config import GgufConfig
from distquant.kernels import reference
from distquant.quantization import Shard
from distquant.quantization.methods.gguf import GgufScheme
from distquant.sharding.partition import even_partition

NAME = "model.layers.0.mlp.up_proj.weight"


def stored_blocks(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    weight = np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(ggufs.blocks(weight, kind, 0).copy().view(np.uint8))


@pytest.mark.parametrize("kind", sorted(BLOCKS))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_slicing_commutes_with_dequantizing(kind, data):
    block, _ = BLOCKS[kind]
    rows, blocks = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    shape, dim, ranks = (rows, blocks * block), data.draw(st.integers(0, 1)), data.draw(st.integers(1, 4))
    scheme = GgufScheme(GgufConfig(gguf_file="x.gguf", types={NAME: kind}))
    layout = scheme.layout(NAME, shape, "float32")
    component = layout.component("")
    stored = stored_blocks(kind, shape).view(component.shape(shape))
    whole = scheme.dequantize(Shard(NAME, shape, "float32"), {"": stored}, torch.float32, reference)
    for alignment in layout.alignments(shape, dim):
        partition = even_partition(shape[dim], alignment, ranks)
        if partition is None:
            continue
        for rank in range(ranks):
            ((start, stop),) = partition.segments(rank)
            at, first, last = component.slice(shape, dim, start, stop)
            part = stored.narrow(at, first, last - first).contiguous()
            shard = Shard(NAME, shape, "float32", dim, partition, rank)
            found = scheme.dequantize(shard, {"": part}, torch.float32, reference)
            assert torch.equal(found, whole.narrow(dim, start, stop - start))
