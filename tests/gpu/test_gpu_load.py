"""Loads on a GPU; skipped, visibly, where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

import distquant as dq
from distquant.loading.loader import load_shard
from distquant.options import RunOptions
from distquant.parallel.comm import SoloComm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-dq", "fp4-dq", "int8"])
def test_bits_on_the_gpu_are_those_on_the_cpu(kjv_tiny: str, quant: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config=quant)
    on_gpu, on_cpu = load_shard(plan, SoloComm(), "cuda:0"), load_shard(plan, SoloComm(), "cpu")
    assert {parameter.device.type for parameter in on_gpu.parameters()} == {"cuda"}
    assert dq.fingerprint(on_gpu) == dq.fingerprint(on_cpu)


@pytest.mark.parametrize("quant", ["fp8-row", "fp8-tensor", "fbgemm_fp8"])
def test_products_in_float8(kjv_tiny: str, quant: str) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this GPU")
    ids = torch.arange(1, 33).view(1, -1)
    by_gpu = dq.load(kjv_tiny, quantization_config=quant, dtype="bfloat16")
    assert by_gpu.distquant.report.forward.startswith("torch's scaled_mm")
    plan = dq.plan(kjv_tiny, quantization_config=quant, dtype="bfloat16")
    by_cpu = load_shard(plan, SoloComm(), "cpu", RunOptions(forward="float8"))
    with torch.no_grad():
        a, b = by_gpu(ids.cuda()).logits.float().cpu(), by_cpu(ids).logits.float()
    assert float((a - b).norm() / b.norm()) < 0.05


@pytest.mark.parametrize("quant", ["none", "nf4-dq", "int8"])
def test_a_model_on_the_gpu_answers_and_keeps_its_bits(kjv_tiny: str, quant: str) -> None:
    model = dq.load(kjv_tiny, quantization_config=quant)
    before = dq.fingerprint(model)
    inputs = AutoTokenizer.from_pretrained(kjv_tiny)("In the beginning", return_tensors="pt").to(model.device)
    assert model.generate(**inputs, max_new_tokens=8).shape[1] > inputs.input_ids.shape[1]
    assert dq.fingerprint(model) == before
