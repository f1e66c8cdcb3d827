"""Tensors that a family keeps in float32: the plan says which, and whose decision that is."""

from __future__ import annotations

import pytest
import torch
import transformers
from moe_models import FAMILIES
from packaging.version import Version
from transformers import AutoModelForCausalLM

import distquant as dq

RELEASE = Version(transformers.__version__).release[:2]
GATE = "model.layers.*.mlp.gate"


def kept(plan: dq.LoadPlan) -> list[str]:
    return [note for note in plan.notes if note.startswith("kept in")]


def note(leaf: str) -> str:
    why = f"as transformers {RELEASE[0]}.{RELEASE[1]} does (_keep_in_fp32_modules_strict)"
    return f"kept in float32: 2 tensors ({GATE}.{leaf}), {why}"


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_plan_says_what_is_kept_in_float32_and_why(moe_of, quant):
    leaves = ["e_score_correction_bias", *(["weight"] if RELEASE >= (5, 24) else [])]
    plan = dq.plan(moe_of("deepseek-v3"), quantization_config=quant)
    assert kept(plan) == [note(leaf) for leaf in leaves]
    layers = [f"model.layers.{layer}.mlp.gate.{leaf}" for leaf in leaves for layer in (1, 2)]
    assert sorted(t.name for t in plan.tensors if t.dtype == "float32") == sorted(layers)


def test_a_module_that_makes_its_parameters_in_float32_is_named(moe_of, monkeypatch):
    """Many a router does since 5.24, listed or not; this one is made so here for every version."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    made = DeepseekV3RMSNorm.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.weight = torch.nn.Parameter(self.weight.float())

    monkeypatch.setattr(DeepseekV3RMSNorm, "__init__", make)
    why = f"as transformers {RELEASE[0]}.{RELEASE[1]} does (DeepseekV3RMSNorm)"
    notes = kept(dq.plan(moe_of("deepseek-v3")))
    assert f"kept in float32: 3 tensors (model.layers.*.input_layernorm.weight), {why}" in notes
    assert f"kept in float32: 1 tensor (model.norm.weight), {why}" in notes


def test_nothing_is_said_where_all_is_float32(moe_of):
    assert kept(dq.plan(moe_of("deepseek-v3"), dtype="float32")) == []


def test_non_strict_dtypes_are_for_float16_alone(moe_of):
    path = moe_of("gpt-oss")
    assert kept(dq.plan(path, dtype="bfloat16")) == []
    notes = kept(dq.plan(path, dtype="float16"))
    assert notes
    assert all(note.endswith("does (_keep_in_fp32_modules)") for note in notes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dtypes_are_those_that_transformers_loads(moe_of, family, dtype):
    path = moe_of(family)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).state_dict()
    planned = {tensor.name: tensor.dtype for tensor in dq.plan(path, dtype=dtype).tensors}
    assert planned == {name: str(value.dtype).removeprefix("torch.") for name, value in theirs.items()}
