"""HQQ's encoder: hqq's own bits on one thread, however many threads the process has."""

from __future__ import annotations

import pytest
import torch

from distquant.config import HqqConfig
from distquant.kernels import reference
from distquant.quantization import scheme_for

NAME = "model.layers.0.mlp.up_proj.weight"


def encoded(weight: torch.Tensor, threads: int, **fields: object) -> dict[str, torch.Tensor]:
    scheme = scheme_for(HqqConfig(**fields))  # type: ignore[arg-type]
    components = scheme.encoded_components(NAME, tuple(weight.shape), "bfloat16")  # type: ignore[arg-type]
    out = {
        c.name: torch.empty(c.shape(tuple(weight.shape)), dtype=getattr(torch, c.dtype)).view(-1) for c in components
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scheme.encode(NAME, weight, out, reference)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return out


@pytest.mark.parametrize(("threads", "nbits"), [(2, 1), (3, 8)])
def test_threads_leave_no_trace(threads, nbits):
    """hqq itself gives other codes and zeros for these weights on 2 and 3 threads than on one (measured)."""
    torch.manual_seed(2)
    weight = (torch.randn(2048, 2000) * 0.05).bfloat16()
    one, more = (encoded(weight, count, nbits=nbits, axis=0, group_size=64) for count in (1, threads))
    assert one.keys() == more.keys() == {"", "scales", "zeros"}
    assert all(torch.equal(one[name], more[name]) for name in one)
