"""HQQ: the bits of hqq itself at every width, quantized on the way and stored, and what comes out is its own module."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import work
from safetensors.torch import load_file, save_file

import distquant as dq

DATA = Path(__file__).parents[1] / "data" / "hqq"
KINDS: dict[str, dict[str, Any]] = {
    "4 bits": {"nbits": 4, "group_size": 64, "axis": 1},
    "8 bits": {"nbits": 8, "group_size": 128, "axis": 1},
    "3 bits": {"nbits": 3, "group_size": 32, "axis": 1},
    "2 bits strided": {"nbits": 2, "group_size": 16, "axis": 0},
    "3 bits strided": {"nbits": 3, "group_size": 64, "axis": 0},
    "1 bit": {"nbits": 1, "group_size": 16, "axis": 1},
    "4 bits strided": {"nbits": 4, "group_size": 64, "axis": 0},
    "a row a group": {"nbits": 4, "group_size": None, "axis": 1},
    "a column a group": {"nbits": 8, "group_size": None, "axis": 0},
    "rounded only": {"nbits": 4, "group_size": 64, "axis": 1, "optimize": False},
}


def config(kind: str) -> dict[str, Any]:
    return {"quant_method": "hqq", **KINDS[kind]}


@cache
def theirs(weight: str, kind: str) -> Any:
    """hqq's own module of a weight in a file (`file:name`)."""
    from hqq.core.quantize import HQQLinear, hqq_base_quant_config

    file, _, name = weight.rpartition(":")
    tensor = load_file(file)[name]
    fields = dict(KINDS[kind])
    optimize = fields.pop("optimize", True)
    params = hqq_base_quant_config(**fields)
    params["weight_quant_params"]["optimize"] = optimize
    linear = torch.nn.Linear(*tensor.shape[::-1], bias=False)
    linear.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return HQQLinear(linear, params, compute_dtype=tensor.dtype, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_hqq(model_of, kind):
    path = model_of("llama-352")
    model = dq.load(path, quantization_config=config(kind))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        ours, upstream = model.get_submodule(name), theirs(f"{path}/model.safetensors:{name}.weight", kind)
        assert type(ours) is type(upstream)
        assert torch.equal(ours.dequantize(), upstream.dequantize())
        assert torch.equal(ours.unpack(reshape=False).reshape(-1)[:100], upstream.unpack().reshape(-1)[:100]) or (
            ours.meta["group_size"] != upstream.meta["group_size"]
        )
        if ours.in_features == 128:
            assert torch.equal(ours(x), upstream(x))
        if ours.meta["group_size"] == upstream.meta["group_size"]:
            assert torch.equal(ours.W_q, upstream.W_q)
            assert torch.equal(ours.meta["scale"], upstream.meta["scale"])
            assert torch.equal(ours.meta["zero"], upstream.meta["zero"])
            assert {key: type(value) for key, value in ours.meta.items()} == {
                key: type(value) for key, value in upstream.meta.items()
            }
