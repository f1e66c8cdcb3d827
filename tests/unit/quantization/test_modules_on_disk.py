"""Quantized modules alone on disk, while all others stay: one mlp, one linear, the output head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import distquant as dq

WHOLE = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": []}
"""With the output head."""


@pytest.mark.parametrize("place", ["model.layers.0.mlp", "model.layers.1.mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("quant", ["int4-g64", WHOLE, "mxfp4"], ids=["int4-g64", "fp8", "mxfp4"])
def test_one_module_on_disk(model_of: Any, quant: Any, place: str) -> None:
    path, ids = model_of("llama-gqa"), torch.arange(1, 9)[None]
    plain, moved = dq.load(path, quant), dq.load(path, quant, device_map={"": "cpu", place: "disk"})
    assert all(value.is_meta for value in moved.get_submodule(place).buffers())
    assert dq.fingerprint(moved) == dq.fingerprint(plain)
    with torch.no_grad():
        assert torch.equal(moved(ids).logits, plain(ids).logits)
