"""Tokens find their experts on other ranks, forwards and back: own batches, adapters, answers."""

from __future__ import annotations

from typing import Any

import lora
import moe_training
import pytest
import torch
import work
from moe_ranks import MESHES, METHODS
from test_adapters import ROUNDING
from test_logits import distance

import distquant as dq

TO_ALL = {"dispatch": "all_to_all"}


@pytest.fixture(scope="module")
def alone(moe_of):
    """Logits and gradients of every batch on one rank."""
    known: dict[tuple[str, str], list[Any]] = {}

    def of(family: str, method: str) -> list[Any]:
        if (family, method) not in known:
            path, quant = moe_of(family), METHODS[method]
            known[family, method] = [
                moe_training.own_batch(path, quant, None, number, {}) for number in range(len(moe_training.BATCHES))
            ]
        return known[family, method]

    return of


# -- batches of their own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["ep=3", "ep=2,tp=2"])
@pytest.mark.parametrize(
    ("family", "method"), [("mixtral", "nf4"), ("gpt-oss", "none"), ("qwen2-moe", "fp8"), ("deepseek-v3", "nf4")]
)
def test_all_to_all_computes_each_ranks_own_batch(ranks, moe_of, alone, family, method, mesh):
    plan = dq.plan(moe_of(family), quantization_config=METHODS[method], mesh=mesh, **TO_ALL)
    found = ranks.run(MESHES[mesh], moe_training.own_batch, moe_of(family), METHODS[method], mesh, None, TO_ALL)
    for rank, (logits, gradient) in enumerate(found):
        expected, learnt = alone(family, method)[plan.mesh.coordinates(rank)["ep"]]
        assert distance(logits, expected) < ROUNDING
        assert distance(gradient, learnt) < ROUNDING


@pytest.mark.parametrize("mesh", ["tp=2", "ep=2,tp=2"])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4"])
def test_all_reduce_gives_all_ranks_the_same_gradient(ranks, moe_of, alone, family, mesh):
    expected, learnt = alone(family, "nf4")[0]
    found = ranks.run(MESHES[mesh], moe_training.own_batch, moe_of(family), METHODS["nf4"], mesh, 0, {})
    for logits, gradient in found:
        assert distance(logits, expected) < ROUNDING
        assert distance(gradient, learnt) < ROUNDING


def test_the_choice_is_in_the_plan(moe_of):
    """Two ways to reach the experts are two plans; the weights are the same."""
    plans = [dq.plan(moe_of("mixtral"), quantization_config="nf4", mesh="ep=2", **way) for way in ({}, TO_ALL)]
    assert plans[0].digest != plans[1].digest
    assert "all_reduce" in plans[0].to_json()
    assert "all_to_all" in plans[1].to_json()


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [("mixtral", "nf4", False), ("mixtral", "nf4-dq", True), ("qwen2-moe", "int4", False), ("gpt-oss", "mxfp4", False)],
)
def test_adapters_on_attention_learn_as_on_one_rank(ranks, moe_of, family, method, checkpointing):
    """Gradients of the first layer pass through the experts of all above it."""
    path, quant = moe_of(family), METHODS[method]
    logits, losses, gradients = moe_training.train(path, quant, None, checkpointing)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1e-2
    for mesh in ("ep=2", "tp=2"):
        plan = dq.plan(path, quantization_config=quant, mesh=mesh)
        results = ranks.run(2, moe_training.train, path, quant, mesh, checkpointing)
        for rank, (theirs, their_losses, found) in enumerate(results):
            assert distance(theirs, logits) < ROUNDING
            assert their_losses == pytest.approx(losses, rel=1e-4)
            for (module, side), truth in gradients.items():
                assert truth.abs().max() > 1e-6, f"{module} {side}: a gradient of zero would prove nothing"
                partition = lora.partition_of(plan, module, side)
                tp = plan.mesh.coordinates(rank)["tp"]
                parts = [truth.narrow(partition[0], a, b - a) for a, b in partition[1].segments(tp)] if partition else [truth]
                expected = torch.cat(parts, partition[0] if partition else 0)
                error = (found[module, side] - expected).abs().max() / truth.abs().max()
                assert float(error) < ROUNDING, f"{module} {side} at {mesh} on rank {rank}"


@pytest.mark.parametrize("targets", [("q_proj", "gate_proj", "up_proj", "down_proj"), "all-linear"])
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_usual_targets_find_the_linears_and_pass_experts_by(moe_of, method, targets):
    """Names that a shared expert's linears have too; what is fused in the model's own module is no target either."""
    from peft import LoraConfig, get_peft_model

    model = dq.load(moe_of("qwen2-moe"), quantization_config=METHODS[method], dtype="float32")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets if targets == "all-linear" else [*targets]))
    paths = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert {path.rpartition(".")[2] for path in paths} >= {"q_proj", "gate_proj", "up_proj", "down_proj"}
    assert not [path for path in paths if ".experts" in path]
    with torch.no_grad():
        adapted(torch.tensor(work.IDS))


@pytest.mark.parametrize("method", ["nf4-dq", "int4", "mxfp4"])
def test_quantized_experts_are_not_saved_in_a_form_that_nothing_reads(moe_of, tmp_path, method):
    model = dq.load(moe_of("mixtral"), quantization_config=METHODS[method])
    with pytest.raises(dq.InputError, match="experts"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_training_step_leaves_the_fingerprint(ranks, moe_of):
    for before, after in ranks.run(2, moe_training.fingerprints_of_step, moe_of("gpt-oss"), METHODS["nf4-dq"], "ep=2"):
        assert before == after


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["ep=3", "tp=2"])
def test_greedy_answers_are_those_of_one_rank(ranks, moe_of, mesh):
    jobs = [(moe_of(family), "nf4-dq") for family in ("mixtral", "deepseek-v3", "gpt-oss", "llama4")]
    assert ranks.run(MESHES[mesh], moe_training.tokens, jobs, mesh) == [moe_training.tokens(jobs)] * MESHES[mesh]


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "mxfp4"])
def test_generate_leaves_experts_as_they_were(ranks, moe_of, quant):
    found = ranks.run(2, work.traces_of_generate, moe_of("gpt-oss"), quant, "ep=2", False)
    for before, after, changed in found:
        assert before == after
        assert changed == []
