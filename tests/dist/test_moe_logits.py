"""Arithmetic of quantized experts: what transformers' own model computes with the values that the codes mean.

Tolerances as in `test_logits`: float32 throughout, sums in another order. Experts in LLM.int8 are dequantized like all
others; only linears quantize activations there, so these are left out where it is compared.
"""

from __future__ import annotations

from pathlib import Path

import moe_ranks
import pytest
import torch
import work
from moe_models import FAMILIES
from moe_ranks import EVERY, MESHES, METHODS, MOST
from moe_reference import reference_logits
from test_logits import ROUNDING, distance
from transformers import AutoTokenizer
from upstream import their_model

import distquant as dq

EXPERTS_ONLY = {**METHODS, "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "include_modules": [r".*\.experts"]}}
OF_ALL = ("nf4", "nf4-dq", "fp8")
"""Methods that every family is compared in."""
OF_SOME = ("none", "int8", "fp8-row", "int4", "mxfp4")


@pytest.fixture(scope="module")
def truth(moe_of):
    """Logits of transformers' model with the dequantized weights."""
    known: dict[tuple[str, str], torch.Tensor] = {}

    def of(family: str, method: str) -> torch.Tensor:
        if (family, method) not in known:
            known[family, method] = reference_logits(moe_of(family), EXPERTS_ONLY[method])
        return known[family, method]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_computes_what_the_dequantized_model_does(moe_of, truth, family):
    methods = [*OF_ALL, *OF_SOME] if family in ("qwen2-moe", "gpt-oss") else OF_ALL
    found = moe_ranks.logits([(moe_of(family), EXPERTS_ONLY[method]) for method in methods])
    for method, logits in zip(methods, found, strict=True):
        assert distance(logits, truth(family, method)) < ROUNDING, method


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_computes_what_one_rank_does(ranks, moe_of, truth, family):
    for mesh in EVERY if family == "gpt-oss" else MOST:
        for (found,) in ranks.run(MESHES[mesh], moe_ranks.logits, [(moe_of(family), METHODS["nf4"])], mesh):
            assert distance(found, truth(family, "nf4")) < ROUNDING, mesh


@pytest.mark.parametrize(("family", "mesh"), [("qwen2-moe", "ep=2,tp=2"), ("gpt-oss", "ep=3"), ("gpt-oss", "tp=2")])
def test_every_method_computes_what_one_rank_does(ranks, moe_of, truth, family, mesh):
    jobs = [(moe_of(family), quant) for quant in EXPERTS_ONLY.values()]
    for found in ranks.run(MESHES[mesh], moe_ranks.logits, jobs, mesh):
        for method, logits in zip(EXPERTS_ONLY, found, strict=True):
            assert distance(logits, truth(family, method)) < ROUNDING, method


LARGE_TILES = "fp8"
"""128 x 128: 96 features cannot be cut, so every rank of tp holds its experts whole; 352 can."""
ONE_PROJECTION = {**METHODS["nf4"], "include_modules": [r".*\.experts\..*down_proj"]}


@pytest.mark.parametrize(
    ("family", "quant"), [("mixtral", LARGE_TILES), ("qwen2-moe", LARGE_TILES), ("olmoe", ONE_PROJECTION)]
)
def test_experts_that_are_whole_or_plain_in_part(ranks, moe_of, family, quant):
    jobs = [(moe_of(family), quant)]
    expected, whole = reference_logits(*jobs[0]), moe_ranks.fingerprints(jobs)
    for mesh in ("tp=2", "ep=2,tp=2"):
        for (found,) in ranks.run(MESHES[mesh], moe_ranks.logits, jobs, mesh):
            assert distance(found, expected) < ROUNDING, mesh
        assert ranks.run(MESHES[mesh], moe_ranks.fingerprints, jobs, mesh) == [whole] * MESHES[mesh]
        stacks = {t.name: t for t in dq.plan(moe_of(family), quantization_config=quant, mesh=mesh).tensors if t.experts}
        assert any(stack.partition is None for stack in stacks.values()) == (family == "mixtral")
        assert {stack.scheme == "none" for stack in stacks.values()} == ({True, False} if family == "olmoe" else {False})


def test_the_reference_is_not_the_unquantized_model(moe_of, truth):
    """Without this, agreement could mean that nothing was quantized."""
    for method in ("nf4", "int8", "mxfp4"):
        assert distance(truth("gpt-oss", method), truth("gpt-oss", "none")) > 1e-3


def test_experts_that_are_neither_quantized_nor_cut_stay_the_models_own(moe_of):
    model = dq.load(moe_of("mixtral"), quantization_config="none")
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"


QUANTIZED_COSTS = 0.2
"""Perplexity of nf4-dq above that of bfloat16: 19.855 and 19.716 measured here, 21.011 and 20.877 on all of the text."""


def test_perplexity_of_a_trained_mixture(ranks, kjv_mixtral):
    text = (Path(kjv_mixtral) / "validation.txt").read_text()[:12000]
    whole = work.perplexity(kjv_mixtral, "nf4-dq", text)
    for mesh in ("ep=2", "tp=2"):
        found = ranks.run(2, work.perplexity, kjv_mixtral, "nf4-dq", text, mesh)
        assert found == [pytest.approx(whole, rel=1e-6)] * 2, mesh
    bf16 = dq.perplexity(their_model(kjv_mixtral), AutoTokenizer.from_pretrained(kjv_mixtral), text)
    assert 0 < whole - bf16 < QUANTIZED_COSTS
