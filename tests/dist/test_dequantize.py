"""`dequantize=True`: a quantized checkpoint loaded as what its codes mean, in ordinary linears, at every width."""

from __future__ import annotations

import pytest
import torch
import work
from torch import nn
from upstream import PREQUANTIZED, their_model

import distquant as dq

DEQUANTIZE = {"dequantize": True}


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("dequantize")

    def path(family: str, kind: str) -> str:
        folder = root / f"{family}-{kind}"
        if not folder.exists():
            their_model(model_of(family), *PREQUANTIZED[kind]).save_pretrained(folder)
        return str(folder)

    return path


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
@pytest.mark.parametrize("family", ["llama-gqa", "phi3-packed", "llama-352"])
def test_weights_are_what_the_quantized_model_means(ranks, saved, family, kind):
    path = saved(family, kind)
    quantized, plain = dq.load(path), dq.load(path, quantization_config=DEQUANTIZE)
    meant = work.dequantized_weights(path, None)
    assert meant
    for name, weight in meant.items():
        module = plain.get_submodule(name)
        assert type(module) is nn.Linear
        assert torch.equal(module.weight.data, weight.to(plain.dtype)), name
    assert not getattr(plain, "is_quantized", False)
    assert getattr(plain.config, "quantization_config", None) is None
    rows, ours = plain.distquant.report, quantized.distquant.report
    assert rows.quantized_bytes == 0 and rows.unquantized_bytes > ours.quantized_bytes + ours.unquantized_bytes
    assert rows.unquantized_bytes == plain.distquant.plan.memory[0].finished
    truth = dq.fingerprint(plain)
    assert truth != dq.fingerprint(quantized)
    for width in (2, 3):
        assert ranks.run(width, work.fingerprint, path, DEQUANTIZE, f"tp={width}") == [truth] * width


def test_plan_says_so(saved):
    plan = dq.plan(saved("llama-gqa", "nf4-dq"), quantization_config=DEQUANTIZE, mesh="tp=2")
    assert plan.dequantize
    assert any(note.startswith("dequantized: 14 linear modules") for note in plan.notes)
    assert dq.plan(saved("llama-gqa", "nf4-dq"), mesh="tp=2").memory[0].finished < plan.memory[0].finished


def test_result_can_be_saved_and_read_back(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    model = dq.load(saved("llama-gqa", "int8"), quantization_config=DEQUANTIZE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
