"""Loads on a GPU; skipped, visibly, where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import distquant as dq
from distquant.comm import SoloComm
from distquant.loader import load_shard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-dq", "fp4-dq", "int8"])
def test_bits_on_the_gpu_are_those_on_the_cpu(kjv_tiny: str, quant: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config=quant)
    on_gpu, on_cpu = load_shard(plan, SoloComm(), "cuda:0"), load_shard(plan, SoloComm(), "cpu")
    assert {parameter.device.type for parameter in on_gpu.parameters()} == {"cuda"}
    assert dq.fingerprint(on_gpu) == dq.fingerprint(on_cpu)


@pytest.mark.parametrize("quant", ["none", "nf4-dq", "int8"])
def test_a_model_on_the_gpu_answers_and_keeps_its_bits(kjv_tiny: str, quant: str) -> None:
    model = dq.load(kjv_tiny, quantization_config=quant)
    before = dq.fingerprint(model)
    inputs = AutoTokenizer.from_pretrained(kjv_tiny)("In the beginning", return_tensors="pt").to(model.device)
    assert model.generate(**inputs, max_new_tokens=8).shape[1] > inputs.input_ids.shape[1]
    assert dq.fingerprint(model) == before
