"""PEFT's LoRA on a sharded model computes and learns what it does on a whole one."""

from __future__ import annotations

import lora
import pytest
import torch
import work

import distquant as dq
from distquant.parallel.lora import AdapterError

ROUNDING = 5e-5
"""As for logits (see test_logits.py); a gradient sums over tokens and layers once more."""


def compare(path: str, name: str, mesh: str, results: list, whole) -> None:
    """Logits, loss and gathered gradients of all ranks against those of one."""
    plan = dq.plan(path, quantization_config=work.bnb(name), mesh=mesh)
    logits, loss, gradients = whole
    for theirs, their_loss, _ in results:
        assert float((theirs - logits).abs().max() / logits.abs().max()) < ROUNDING
        assert their_loss == pytest.approx(loss, rel=ROUNDING)
    for (module, side), truth in gradients.items():
        assert truth.abs().max() > 1e-6, f"{module} {side}: a gradient of zero would prove nothing"
        partition = lora.partition_of(plan, module, side)
        for rank, (_, _, found) in enumerate(results):
            parts = [truth.narrow(partition[0], a, b - a) for a, b in partition[1].segments(rank)] if partition else [truth]
            expected = torch.cat(parts, partition[0] if partition else 0)
            error = (found[module, side] - expected).abs().max() / truth.abs().max()
            assert float(error) < ROUNDING, f"{module} {side} on rank {rank}"


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("name", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-biases", "llama-96"])
def test_logits_and_gradients_equal_those_of_one_rank(ranks, model_of, family, name, width):
    """Targets are column- and row-parallel. At tp=3 the kv heads of most are repeated, so v_proj is left out there."""
    path, mesh = model_of(family), f"tp={width}"
    targets = lora.TARGETS if width == 2 or family == "llama-96" else ("q_proj", "o_proj", "gate_proj", "down_proj")
    whole = lora.train(path, name, None, targets)
    compare(path, name, mesh, ranks.run(width, lora.train, path, name, mesh, targets), whole)


def test_packed_projections_take_adapters(ranks, model_of):
    path, targets = model_of("phi3-packed"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    whole = lora.train(path, "nf4", None, targets)
    compare(path, "nf4", "tp=2", ranks.run(2, lora.train, path, "nf4", "tp=2", targets), whole)


def test_biases_of_row_parallel_modules_are_added_once(ranks, model_of):
    path, targets = model_of("neox-per-head"), ("query_key_value", "dense", "dense_4h_to_h")
    whole = lora.train(path, "nf4", None, targets)
    compare(path, "nf4", "tp=2", ranks.run(2, lora.train, path, "nf4", "tp=2", targets), whole)


def test_adapter_on_the_output_head(ranks, model_of):
    path, targets = model_of("llama-gqa"), ("q_proj", "lm_head")
    whole = lora.train(path, "nf4", None, targets)
    compare(path, "nf4", "tp=2", ranks.run(2, lora.train, path, "nf4", "tp=2", targets), whole)


@pytest.mark.parametrize("name", ["none", "nf4"])
def test_prepare_model_for_kbit_training(ranks, model_of, name):
    path = model_of("llama-gqa")
    whole = lora.train_prepared(path, name, None)
    compare(path, name, "tp=2", ranks.run(2, lora.train_prepared, path, name, "tp=2"), whole)


def test_int8_trains_within_the_error_of_the_method(ranks, model_of):
    path = model_of("llama-gqa")
    logits, loss, _ = lora.train(path, "int8", None)
    for theirs, their_loss, gradients in ranks.run(2, lora.train, path, "int8", "tp=2"):
        assert (theirs - logits).norm() / logits.norm() < 2e-2
        assert their_loss == pytest.approx(loss, rel=2e-2)
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients.values())


def test_replicated_halves_start_equal_on_all_ranks(ranks, model_of):
    first, second = ranks.run(2, lora.logits_after_wiring, model_of("llama-gqa"), "nf4", "tp=2")
    assert torch.equal(first, second)


def test_training_step_leaves_the_fingerprint(ranks, model_of):
    for before, after in ranks.run(2, lora.fingerprint_after_step, model_of("llama-gqa"), "nf4-dq", "tp=2"):
        assert before == after


def test_generate_with_adapters(ranks, model_of):
    path = model_of("llama-gqa")
    assert ranks.run(2, lora.answer, path, "nf4", "tp=2") == [lora.answer(path, "nf4", None)] * 2


@pytest.mark.parametrize("width", [3, 4])
def test_repeated_kv_heads_are_refused(ranks, model_of, width):
    errors = ranks.run(width, work.error_of, lora.train, model_of("llama-gqa"), "nf4", f"tp={width}", ("v_proj",))
    assert [type(error) for error in errors] == [AdapterError] * width
    assert all("v_proj" in str(error) and "repeated" in str(error) for error in errors)


def test_embedding_as_target_is_refused(ranks, model_of):
    errors = ranks.run(2, work.error_of, lora.train, model_of("llama-gqa"), "nf4", "tp=2", ("embed_tokens",))
    assert [type(error) for error in errors] == [AdapterError] * 2


def test_saving_adapters_of_a_sharded_model_is_refused(ranks, model_of, tmp_path):
    """PEFT would write every rank's part as if it were the whole. At tp=1 it writes them."""
    target = tmp_path / "adapter"
    errors = ranks.run(2, work.error_of, lora.save_adapter, model_of("llama-gqa"), "nf4", "tp=2", str(target))
    assert [type(error) for error in errors] == [dq.InputError] * 2
    assert not list(target.glob("*.safetensors"))
    lora.save_adapter(model_of("llama-gqa"), "nf4", None, str(target))
    assert list(target.glob("*.safetensors"))
