"""`dequantize=True`: a quantized checkpoint loaded as what its codes mean, in ordinary linears, at every width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import work
from torch import nn
from upstream import PREQUANTIZED, their_model

import distquant as dq

DATA = Path(__file__).parents[1] / "data"
DEQUANTIZE = {"dequantize": True}


def golden() -> list[str]:
    """Every small checkpoint in tests/data that is stored quantized."""
    configs = sorted(DATA.rglob("config.json"))
    folders = [file.parent for file in configs if "quantization_config" in json.loads(file.read_text())]
    return [str(path.relative_to(DATA)) for path in (*folders, *sorted(DATA.rglob("*.gguf")))]


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("dequantize")

    def path(family: str, kind: str) -> str:
        folder = root / f"{family}-{kind}"
        if not folder.exists():
            their_model(model_of(family), *PREQUANTIZED[kind]).save_pretrained(folder)
        return str(folder)

    return path


def compare(ranks, path: str, widths: tuple[int, ...]) -> None:
    """A checkpoint loaded as it is stored, dequantized by one rank, and dequantized by several."""
    quantized, plain = dq.load(path), dq.load(path, quantization_config=DEQUANTIZE)
    weights = work.meant(quantized)
    assert weights
    for name, weight in weights.items():
        module = plain.get_submodule(name)
        assert type(module) is nn.Linear
        assert type(module.weight) is nn.Parameter
        assert torch.equal(module.weight.data, weight.to(plain.dtype)), name
    assert not getattr(plain, "is_quantized", False)
    assert getattr(plain.config, "quantization_config", None) is None
    stored, held = quantized.distquant.report, plain.distquant.report
    assert held.unquantized_bytes > stored.quantized_bytes + stored.unquantized_bytes
    assert_planned(plain.distquant.plan, [held])
    truth = dq.fingerprint(plain)
    assert truth != dq.fingerprint(quantized)
    for width in widths:
        plan = dq.plan(path, quantization_config=DEQUANTIZE, mesh=f"tp={width}")
        found = ranks.run(width, work.loaded, plan)
        assert [fingerprint for fingerprint, _ in found] == [truth] * width
        assert_planned(plan, [report for _, report in found])


def assert_planned(plan: dq.LoadPlan, reports: list) -> None:
    assert [(r.quantized_bytes, r.unquantized_bytes) for r in reports] == [(0, row.finished) for row in plan.memory]


@pytest.mark.parametrize("checkpoint", golden())
def test_every_golden_checkpoint_is_what_its_codes_mean(ranks, checkpoint):
    compare(ranks, str(DATA / checkpoint), (2,))


@pytest.mark.parametrize("kind", ["nf4-dq", "int8"])
@pytest.mark.parametrize("family", ["llama-gqa", "phi3-packed", "llama-352"])
def test_weights_are_what_the_quantized_model_means(ranks, saved, family, kind):
    compare(ranks, saved(family, kind), (2, 3))


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
