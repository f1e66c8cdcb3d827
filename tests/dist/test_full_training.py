"""What a rank alone would get wrong in training is right over ranks, or refused."""

from __future__ import annotations

import full_training
import pytest
import torch
import work

import distquant as dq
from distquant.parallel.lora import AdapterError

ROUNDING = 5e-5


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert expected.abs().max() > 1e-6, f"{name}: zeros would prove nothing"
    assert (found - expected).abs().max() / expected.abs().max() < ROUNDING, name


def test_head_norms_over_micro_batches(ranks, model_of):
    path = model_of("qwen3-head-norms")
    whole = full_training.accumulated(path, None, "norm")
    assert any("q_norm" in name for name in whole)
    for theirs in ranks.run(2, full_training.accumulated, path, "tp=2", "norm"):
        assert theirs.keys() == whole.keys()
        for name, expected in whole.items():
            assert_close(theirs[name], expected, name)


def test_head_norms_in_a_copy_of_pefts(ranks, model_of):
    path = model_of("qwen3-head-norms")
    whole = full_training.accumulated_in_a_copy(path, None)
    assert whole
    for theirs in ranks.run(2, full_training.accumulated_in_a_copy, path, "tp=2"):
        for name, expected in whole.items():
            assert_close(theirs[name], expected, name)


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-biases"])
def test_repeated_kv_heads_as_full_weights(ranks, model_of, family, width):
    path, mesh = model_of(family), f"tp={width}"
    plan = dq.plan(path, quantization_config="none", mesh=mesh)
    whole = full_training.accumulated(path, None, "_proj")
    for rank, theirs in enumerate(ranks.run(width, full_training.accumulated, path, mesh, "_proj")):
        for name in (name for name in whole if "k_proj" in name or "v_proj" in name):
            partition = plan.partitions[plan.modules[name.rpartition(".")[0]].partition]
            assert partition.repeated
            if "k_proj.bias" in name:
                continue  # its gradient is zero: it adds the same to all scores of a query
            parts = torch.cat([whole[name][a:b] for a, b in partition.segments(rank)])
            assert (theirs[name] - parts).abs().max() / whole[name].abs().max() < ROUNDING, name


def test_an_adapter_added_again_under_its_name(ranks, model_of):
    path = model_of("llama-gqa")
    whole = full_training.logits_of_a_second_adapter(path, None)
    for theirs in ranks.run(2, full_training.logits_of_a_second_adapter, path, "tp=2"):
        assert_close(theirs, whole, "logits")


@pytest.mark.parametrize("init", ["olora", "pissa", "pissa_niter_2", "orthogonal", "mica"])
def test_initial_values_from_the_weight_are_refused(ranks, model_of, init):
    errors = ranks.run(2, work.error_of, full_training.start, model_of("llama-gqa"), "tp=2", init)
    assert [type(error) for error in errors] == [AdapterError] * 2, errors
    assert all(repr(init) in str(error) and "\n" not in str(error) for error in errors)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_drawn_initial_values_change_nothing_at_the_start(ranks, model_of, init):
    path = model_of("llama-gqa")
    whole = work.logits(path, "none")
    for theirs in ranks.run(2, full_training.start, path, "tp=2", init):
        assert_close(theirs, whole, "logits")


def test_dropout_of_adapters_is_refused_in_training_only(ranks, model_of):
    path = model_of("llama-gqa")
    for error in ranks.run(2, work.error_of, full_training.with_dropout, path, "tp=2", True):
        assert isinstance(error, dq.InputError) and "lora_dropout=0" in str(error)
    whole = full_training.with_dropout(path, None, False)
    for theirs in ranks.run(2, full_training.with_dropout, path, "tp=2", False):
        assert_close(theirs, whole, "logits")


def test_dropout_of_the_model_is_refused_in_training(ranks, model_of):
    for error in ranks.run(2, work.error_of, full_training.base_dropout, model_of("neox-per-head"), "tp=2"):
        assert isinstance(error, dq.InputError) and "dropout of 0.1" in str(error)


def test_clipping_is_warned_of_once(ranks, model_of):
    path = model_of("llama-gqa")
    for said in ranks.run(2, full_training.warnings_of_training, path, "tp=2"):
        assert len(said) == 1 and "Do not clip" in said[0]
    assert full_training.warnings_of_training(path, None) == []
