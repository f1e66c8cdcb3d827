"""The memory that a plan announces is that which a load and a forward take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import distquant as dq
from distquant.sharding.mesh import Mesh


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """Everything that one layer of transformers' cache holds."""
    held = []
    for value in vars(layer).values():
        held += list(value.values()) if isinstance(value, dict) else [value]
    # A window's length is a number, kept as a tensor.
    return [value for value in held if isinstance(value, torch.Tensor) and value.dim()]


def measured(path: str, quant: str, mesh: str, context: int, batch: int) -> tuple[int, int, int, dq.LoadPlan]:
    """Bytes of the cache after a forward, of the load buffer and of the weights; and the plan."""
    model = dq.load(path, quantization_config=quant, mesh=mesh)
    tokens = torch.arange(batch * context).view(batch, context) % 50 + 3
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    held = sum(tensor.nbytes for layer in cache.layers for tensor in tensors_of(layer))
    report = model.distquant.report
    return held, report.staging_bytes, report.quantized_bytes + report.unquantized_bytes, model.distquant.plan


def compare(ranks: Any, path: str, quant: str, mesh: str, context: int = 24, batch: int = 2) -> dq.LoadPlan:
    """Compares each rank's figures with those of a plan made beforehand."""
    world = Mesh.parse(mesh).size
    plan = dq.plan(path, quantization_config=quant, mesh=mesh)
    planned = {rank: device for device in plan.memory_for(context, batch) for rank in device.ranks}
    assert sorted(planned) == list(range(world))
    for rank, (held, buffer, weights, _) in enumerate(ranks.run(world, measured, path, quant, mesh, context, batch)):
        device = planned[rank]
        assert (device.cache, device.load_buffer, device.weights) == (held, buffer, weights)
        assert held > 0
    return plan


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
@pytest.mark.parametrize(
    ("family", "quant"),
    [
        ("llama-gqa", "nf4-dq"),
        ("qwen2-biases", "none"),
        ("phi3-packed", "int8"),
        ("neox-per-head", "nf4"),
        ("gemma2", "none"),  # its window of 8 is shorter than the context
        ("qwen3-head-norms", "gptq-rtn"),
    ],
)
def test_cache_and_load_buffer_are_as_planned(ranks, model_of, family, quant, mesh) -> None:
    compare(ranks, model_of(family), quant, mesh)


@pytest.mark.parametrize("mesh", ["tp=3", "dp=2,tp=2"])
def test_repeated_heads_and_replicas_are_counted(ranks, model_of, mesh) -> None:
    """At tp=3 two kv heads are on three ranks, so together they hold more than one device would."""
    compare(ranks, model_of("llama-gqa"), "none", mesh)


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2", "ep=2"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_experts_and_latent_attention_are_as_planned(ranks, moe_of, family, mesh) -> None:
    compare(ranks, moe_of(family), "none", mesh)


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2"])
@pytest.mark.parametrize("name", ["kjv_tiny", "kjv_llama", "kjv_mixtral"])
def test_trained_models_are_as_planned(ranks, request, name, mesh) -> None:
    compare(ranks, request.getfixturevalue(name), "none", mesh, context=100, batch=1)


@pytest.mark.parametrize("staging", ["1KiB", "1MiB", "512MiB"])
@pytest.mark.parametrize("quant", ["none", "nf4-dq", "hqq", "fp8-tensor"])
def test_load_buffer_is_what_the_report_measures(model_of, quant, staging) -> None:
    """Also where the smallest piece is larger than the budget, and where a whole weight is one piece."""
    model = dq.load(model_of("llama-352"), quantization_config=quant, staging=staging)
    (device,) = dq.plan(model_of("llama-352"), quantization_config=quant, staging=staging).memory_for()
    assert device.load_buffer == model.distquant.report.staging_bytes


def test_stored_weights_have_the_buffer_of_their_components(model_of, tmp_path) -> None:
    model = dq.load(model_of("llama-gqa"), quantization_config="nf4-dq")
    model.save_pretrained(tmp_path)
    stored = dq.load(str(tmp_path), staging="1KiB")
    (device,) = dq.plan(str(tmp_path), staging="1KiB").memory_for()
    assert device.load_buffer == stored.distquant.report.staging_bytes
    assert device.weights == model.distquant.report.quantized_bytes + model.distquant.report.unquantized_bytes


def test_a_loaded_model_has_the_same_estimates(model_of) -> None:
    *_, plan = measured(model_of("llama-gqa"), "nf4", "tp=1", 5, 1)
    before = dq.plan(model_of("llama-gqa"), quantization_config="nf4")
    without = [replace(device, limit=None, load_limit=None) for device in plan.memory_for(5)]
    assert without == list(before.memory_for(5))
