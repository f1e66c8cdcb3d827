"""Quantized experts on a GPU; skipped, visibly, where there is none."""

from __future__ import annotations

import pytest
import torch

import distquant as dq
from distquant.loading.loader import load_shard
from distquant.parallel import experts
from distquant.parallel.comm import SoloComm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "fp8", "mxfp4"])
def test_bits_on_the_gpu_are_those_on_the_cpu(moe_of, quant: str) -> None:
    plan = dq.plan(moe_of("mixtral"), quantization_config=quant, dtype="bfloat16")
    on_gpu, on_cpu = load_shard(plan, SoloComm(), "cuda:0"), load_shard(plan, SoloComm(), "cpu")
    assert {buffer.device.type for buffer in on_gpu.buffers()} == {"cuda"}
    assert dq.fingerprint(on_gpu) == dq.fingerprint(on_cpu)
    tokens = torch.arange(24).view(2, 12)
    torch.testing.assert_close(
        on_gpu(tokens.cuda()).logits.cpu().float(), on_cpu(tokens).logits.float(), rtol=5e-2, atol=5e-2
    )


def test_one_kernel_for_many_experts_gives_what_one_for_each_gives(moe_of, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dq.load(moe_of("mixtral"), quantization_config="nf4-dq", dtype="bfloat16")
    tokens = torch.arange(24, device=model.device).view(2, 12)
    calls = []
    grouped = experts.grouped_matmul
    monkeypatch.setattr(experts, "grouped_matmul", lambda *given: calls.append(1) or grouped(*given))
    together = model(tokens).logits.float()
    assert calls
    monkeypatch.setattr(experts, "has_kernel", lambda *_: False)
    torch.testing.assert_close(together, model(tokens).logits.float(), rtol=5e-2, atol=5e-2)
