"""torchao and quanto: one fingerprint at every width, on the fly and pre-quantized; logits, adapters, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import quanto_unpack  # noqa: F401
import torch
import work
from lora import step, wrap
from torch import Tensor

import distquant as dq
from models import save_as_stored

DATA = Path(__file__).parents[1] / "data"
ROUNDING = 2e-5
"""As in test_logits.py: float32 sums in another order."""
GOLDEN = [
    *(f"torchao/{kind}" for kind in ("int8-row", "int8-tensor", "fp8-row", "fp8-tensor", "int4-group")),
    *(f"quanto/{kind}" for kind in ("int8", "float8", "int4", "int2")),
]


def ao(name: str, **data: Any) -> dict[str, Any]:
    inner = {"_type": name, "_version": 2, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": inner}}


TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
GROUP = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}
INT4 = {"_type": "torch.dtype", "_data": "int4"}
METHODS: dict[str, Any] = {
    "torchao-int8": "torchao-int8",
    "torchao-int8-tensor": ao("Int8WeightOnlyConfig", granularity=TENSOR),
    "torchao-int8-group": ao("Int8WeightOnlyConfig", granularity=GROUP),
    "torchao-int8-dynamic": ao("Int8DynamicActivationInt8WeightConfig"),
    "torchao-fp8": "torchao-fp8",
    "torchao-fp8-tensor": ao("Float8WeightOnlyConfig", granularity=TENSOR),
    "torchao-intx": ao("IntxWeightOnlyConfig", weight_dtype=INT4, granularity=GROUP),
    "quanto-int8": "quanto-int8",
    "quanto-float8": {"quant_method": "quanto", "weights": "float8"},
    "quanto-int4": "quanto-int4",
    "quanto-int2": {"quant_method": "quanto", "weights": "int2"},
}


def logits(path: str, quant: Any, mesh: str | None = None) -> Tensor:
    with torch.no_grad():
        return dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")(torch.tensor(work.IDS)).logits


def state_of(path: str, quant: Any, mesh: str | None = None) -> tuple[str, int, int]:
    """Fingerprint, finished bytes of quantized weights, and what the plan says they are."""
    model = dq.load(path, quantization_config=quant, mesh=mesh)
    return (
        dq.fingerprint(model),
        model.distquant.report.quantized_bytes,
        model.distquant.plan.memory[work.rank()].quantized,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama-352", "phi3-packed"])
def test_one_fingerprint_at_every_width_and_bytes_as_planned(ranks, model_of, family, method):
    path, quant = model_of(family), METHODS[method]
    truth = state_of(path, quant)
    assert truth[1] == truth[2] > 0
    for width in (2, 3, 4):
        for found in ranks.run(width, state_of, path, quant, f"tp={width}"):
            assert found[0] == truth[0]
            assert found[1] == found[2]
    plan = dq.plan(path, quantization_config=quant, mesh="tp=2")
    assert [t.name for t in plan.tensors if t.scheme != "none" and t.partition is None] == []


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("quanto-float8", "quanto-int4")])
def test_one_rank_computes_what_transformers_does(model_of, method):
    from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

    path = model_of("llama-352")
    model = dq.load(path, quantization_config=METHODS[method])
    written = model.distquant.plan.quantization_config
    config = (TorchAoConfig if method.startswith("torchao") else QuantoConfig).from_dict(written)
    them = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
    for name in model.distquant.plan.converted:
        assert type(them.get_submodule(name).weight) is type(model.get_submodule(name).weight), name
    with torch.no_grad():
        assert torch.equal(model(torch.tensor(work.IDS)).logits, them(torch.tensor(work.IDS)).logits)


def test_methods_have_different_fingerprints(model_of):
    found = {method: work.fingerprint(model_of("llama-352"), quant) for method, quant in METHODS.items()}
    same = {"torchao-int8-dynamic"}  # the weights of torchao-int8
    assert found["torchao-int8-dynamic"] == found["torchao-int8"]
    assert len({value for method, value in found.items() if method not in same}) == len(METHODS) - len(same)


@pytest.mark.parametrize("method", ["torchao-int8-tensor", "torchao-fp8", "torchao-intx", "quanto-int8", "quanto-int4"])
def test_small_staging_leaves_no_trace(ranks, model_of, method):
    path, quant = model_of("llama-352"), METHODS[method]
    found = ranks.run(2, work.fingerprint_staged, path, quant, "tp=2", "1KiB")
    assert found == [work.fingerprint(path, quant)] * 2


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_files_have_one_fingerprint_at_every_width(ranks, kind):
    path = str(DATA / kind)
    truth = state_of(path, None)
    assert truth[1] == truth[2] > 0
    for width in (2, 3, 4):
        for found in ranks.run(width, state_of, path, None, f"tp={width}"):
            assert found[0] == truth[0]
            assert found[1] == found[2]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "torchao-int8-dynamic"])
def test_logits_of_two_ranks_equal_those_of_one(ranks, model_of, method):
    path, quant = model_of("llama-352"), METHODS[method]
    whole = logits(path, quant)
    for found in ranks.run(2, logits, path, quant, "tp=2"):
        assert (found - whole).abs().max() / whole.abs().max() < ROUNDING


def test_int8_activations_stay_within_the_error_of_the_method(ranks, model_of):
    """Activations of a row-parallel layer have a scale for each rank's part."""
    path, quant = model_of("llama-352"), METHODS["torchao-int8-dynamic"]
    whole = logits(path, quant)
    for found in ranks.run(2, logits, path, quant, "tp=2"):
        assert (found - whole).norm() / whole.norm() < 2e-2


def lora_step(path: str, quant: Any, mesh: str | None) -> tuple[float, bool, str, str]:
    """Loss, whether every adapter got a gradient, and the fingerprints before and after."""
    model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")
    before = dq.fingerprint(model)
    peft = wrap(model)
    for name, parameter in peft.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.constant_(parameter, 0.01)
    _, loss, grads = step(peft)
    torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], 0.1).step()
    return loss, all(g is not None and bool(g.abs().sum() > 0) for g in grads.values()), before, dq.fingerprint(peft)


@pytest.mark.parametrize("mesh", [None, "tp=2"])
@pytest.mark.parametrize("method", ["torchao-int8", "torchao-fp8", "torchao-intx", "quanto-int8", "quanto-int4"])
def test_a_lora_step_reaches_all_adapters_and_no_weight(ranks, model_of, method, mesh):
    path, quant = model_of("llama-gqa"), METHODS[method]
    found = ranks.run(2, lora_step, path, quant, mesh) if mesh else [lora_step(path, quant, None)]
    for loss, reached, before, after in found:
        assert loss > 0
        assert reached
        assert before == after


@pytest.mark.parametrize("method", METHODS)
def test_copies_moves_and_generation_change_nothing(model_of, method):
    model = dq.load(model_of("llama-gqa"), quantization_config=METHODS[method])
    truth, ids = dq.fingerprint(model), torch.tensor(work.IDS)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    twin = copy.deepcopy(model)
    assert not any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    name = model.distquant.plan.converted[0]
    assert twin.get_submodule(name).weight is not model.get_submodule(name).weight
    assert dq.fingerprint(twin) == dq.fingerprint(model.to("cpu")) == truth


@pytest.mark.parametrize("method", ["torchao-int8", "torchao-fp8-tensor", "torchao-intx", "quanto-int8", "quanto-int4"])
def test_what_one_rank_saves_loads_again(model_of, tmp_path, method):
    model = dq.load(model_of("llama-352"), quantization_config=METHODS[method])
    save = save_as_stored if method.startswith("quanto") else type(model).save_pretrained
    save(model, tmp_path)
    assert dq.fingerprint(dq.load(tmp_path)) == dq.fingerprint(model)
