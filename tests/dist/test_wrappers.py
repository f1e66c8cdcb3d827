"""Data-parallel wrappers refuse a model whose ranks are no replicas, and work where they are."""

from __future__ import annotations

import importlib.util

import lora
import pytest
import torch
import wrapping

import distquant as dq

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
WRAPPERS = [
    wrapping.ddp,
    wrapping.ddp_around_a_wrapper,
    wrapping.ddp_of_a_layer,
    wrapping.ddp_on_a_mesh,
    wrapping.fsdp1,
    wrapping.fsdp2,
    wrapping.fsdp2_around_a_wrapper,
    wrapping.fsdp2_of_a_layer,
    wrapping.composable_replicate,
    wrapping.accelerate,
    wrapping.accelerate_frozen,
    wrapping.accelerate_fsdp2,
    wrapping.trainer,
    wrapping.evaluation,
    pytest.param(wrapping.deepspeed_zero, marks=needs_deepspeed),
]


def assert_refused(results: list, mesh: str) -> None:
    for error, before, after in results:
        assert isinstance(error, dq.InputError), repr(error)
        assert len(str(error).splitlines()) == 1
        assert mesh in str(error) and "different parts" in str(error)
        assert before == after


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_refused_on_a_model_cut_over_tp(ranks, model_of, wrapper):
    assert_refused(ranks.run(2, wrapping.refused, model_of("llama-gqa"), "none", "tp=2", wrapper, False), "tp=2")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_refused_around_adapters(ranks, model_of, wrapper):
    assert_refused(ranks.run(2, wrapping.refused, model_of("llama-gqa"), "nf4", "tp=2", wrapper, True), "tp=2")


@pytest.mark.parametrize("wrapper", [wrapping.ddp, wrapping.fsdp2, wrapping.trainer])
def test_refused_on_experts_over_ep(ranks, moe_of, wrapper):
    assert_refused(ranks.run(2, wrapping.refused, moe_of("mixtral"), "none", "ep=2", wrapper, False), "ep=2")


def test_ddp_over_all_ranks_names_the_group_that_works(ranks, model_of):
    results = ranks.run(4, wrapping.refused, model_of("llama-gqa"), "nf4", "dp=2,tp=2", wrapping.ddp, True)
    assert_refused(results, "dp=2,tp=2")
    assert ["ranks [0, 2]" in str(error) for error, *_ in results] == [True, False, True, False]
    assert ["ranks [1, 3]" in str(error) for error, *_ in results] == [False, True, False, True]


def test_ddp_over_the_replicas_gives_the_gradients_of_one_rank(ranks, model_of):
    path = model_of("llama-gqa")
    plan = dq.plan(path, quantization_config="nf4", mesh="dp=2,tp=2")
    print_of_one, truth = wrapping.one_rank(path, "nf4")
    for rank, (fingerprint, gradients) in enumerate(
        ranks.run(4, wrapping.gradients_over_replicas, path, "nf4", "dp=2,tp=2")
    ):
        assert fingerprint == print_of_one
        for (module, side), whole in truth.items():
            partition = lora.partition_of(plan, module, side)
            parts = [whole.narrow(partition[0], a, b - a) for a, b in partition[1].segments(rank % 2)] if partition else [whole]
            expected = torch.cat(parts, partition[0] if partition else 0)
            assert (gradients[module, side] - expected).abs().max() / whole.abs().max() < 5e-5, f"{module} {side}"


def test_trainer_over_replicas_alone_has_the_losses_of_one_rank(ranks, model_of):
    """A batch of 4 on one rank is one of 2 on each of two."""
    path = model_of("llama-gqa")
    losses, _, expected = wrapping.losses_of_trainer(path, "nf4", None, 4)
    for theirs, before, after in ranks.run(2, wrapping.losses_of_trainer, path, "nf4", "dp=2", 2):
        assert theirs == pytest.approx(losses, rel=1e-4)
        assert before == after == expected
