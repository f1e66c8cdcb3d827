"""Checkpoints of a method without a scheme: an error, or planned as they are stored, loudly, and never loaded wrong."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from quantized import fp8_like, gptq_like, packed, unquantized
from safetensors.torch import load_file, save_file

import distquant as dq
from distquant.errors import InputError
from distquant.planning import LoadPlan
from distquant.planning.validation import check_supported

Copy = Callable[[str], Path]


@pytest.fixture
def fp8(copy_of: Copy) -> Path:
    return fp8_like(copy_of("llama-gqa"))


def stored_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


def test_an_unknown_method_is_an_error_that_names_the_option(fp8: Path) -> None:
    message = (
        r"^quantization_config\.quant_method: 'eights' is not supported\. "
        r".*Known methods: none, .*on_unsupported='skip' \(--on-unsupported skip\)"
    )
    for call in (dq.plan, dq.load):
        with pytest.raises(InputError, match=message):
            call(fp8)
    with pytest.raises(InputError, match=message):
        dq.plan(fp8, on_unsupported="error")


def test_a_value_that_is_no_choice_is_told_with_everything_else(fp8: Path) -> None:
    with pytest.raises(InputError, match=r"unknown value 'ignore'.*Give one of 'error', 'skip'") as caught:
        dq.plan(fp8, on_unsupported="ignore", dtype="int3", mesh="tp")
    told = [problem.where for problem in caught.value.problems]
    assert told == ["mesh", "dtype", "on_unsupported", "quantization_config.quant_method"]


def test_the_option_changes_nothing_where_the_method_is_known(model_of: Callable[[str], str]) -> None:
    for quant in (None, "nf4-dq"):
        plans = [
            dq.plan(model_of("llama-gqa"), quantization_config=quant, mesh="tp=2", on_unsupported=choice)
            for choice in ("error", "skip")
        ]
        assert plans[0] == plans[1]


def test_skipped_weights_keep_their_places_in_the_dtype_of_the_files(fp8: Path) -> None:
    plan = dq.plan(fp8, on_unsupported="skip")
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    assert {dtype for name, dtype in dtypes.items() if "_proj" in name} == {"float8_e4m3fn"}
    assert {dtype for name, dtype in dtypes.items() if "_proj" not in name} == {"bfloat16"}
    assert all(tensor.scheme == "none" for tensor in plan.tensors)
    assert (plan.prequantized, plan.converted, plan.quantization_config["quant_method"]) == (True, (), "eights")
    scales = sum(t.nbytes for n, t in load_file(fp8 / "model.safetensors").items() if n.endswith("_scale_inv"))
    (rank,) = plan.memory
    assert rank.read == rank.unquantized == stored_bytes(fp8) - scales
    assert LoadPlan.from_json(plan.to_json()) == plan


def test_skipped_weights_are_cut_as_the_model_asks(fp8: Path, model_of: Callable[[str], str]) -> None:
    plan, plain = dq.plan(fp8, mesh="tp=2", on_unsupported="skip"), dq.plan(model_of("llama-gqa"), mesh="tp=2")
    assert (plan.partitions, plan.modules, plan.rules) == (plain.partitions, plain.modules, plain.rules)
    partitions, plain_cuts = ({t.name: (t.shard_dim, t.partition) for t in its.tensors} for its in (plan, plain))
    assert partitions == plain_cuts


def test_notes_say_what_is_skipped_and_what_is_left_out(fp8: Path) -> None:
    first, second, *rest = dq.plan(fp8, on_unsupported="skip").notes
    assert first.startswith("SKIPPED: no scheme for the checkpoint's method 'eights'")
    assert "14 as float8_e4m3fn" in first and "not loaded" in first
    assert second == "left out beside those weights: 14 weight_scale_inv; 80 B, not in the memory table"
    assert not any(note.startswith("dropped") for note in rest)


def test_tensors_of_other_names_take_the_place_of_their_weight(copy_of: Copy) -> None:
    folder = gptq_like(copy_of("llama-gqa"))
    plan = dq.plan(folder, mesh="tp=2", on_unsupported="skip")
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    module = "model.layers.0.mlp.down_proj"
    assert f"{module}.weight" not in tensors
    assert (tensors[f"{module}.qweight"].dtype, tensors[f"{module}.qweight"].shape) == ("int32", (24, 128))
    assert tensors[f"{module}.scales"].shard_dim is None, "nothing tells how to cut it"
    assert module not in plan.modules and "model.layers.0.self_attn.o_proj" in plan.modules
    assert any(rule.pattern == "model.layers.*.mlp.down_proj" and rule.became == "replicate" for rule in plan.rules)
    assert dq.plan(folder, on_unsupported="skip").memory[0].read == stored_bytes(folder)


def test_a_packed_weight_of_the_right_name_is_planned_in_its_stored_shape(copy_of: Copy) -> None:
    folder = packed(copy_of("llama-gqa"))
    plan = dq.plan(folder, mesh="tp=2", on_unsupported="skip")
    tensor = next(t for t in plan.tensors if t.name == "model.layers.1.mlp.up_proj.weight")
    assert (tensor.shape, tensor.dtype, tensor.shard_dim) == ((192, 64), "uint8", None)
    assert dq.plan(folder, on_unsupported="skip").memory[0].unquantized == stored_bytes(folder)


@pytest.mark.parametrize("store", [fp8_like, gptq_like, packed])
def test_load_refuses_before_a_weight_is_read(store, copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store(copy_of("llama-gqa"))
    plan = dq.plan(folder, on_unsupported="skip")
    method = plan.quantization_config["quant_method"]
    message = rf"^on_unsupported: weights are stored quantized with '{method}'.* \d+ tensors, model\."
    with pytest.raises(InputError, match=message):
        check_supported(plan)
    monkeypatch.setattr(
        "distquant.loading.loader.build_for_load", lambda *_, **__: pytest.fail("the refusal came too late")
    )
    for given in (plan, LoadPlan.from_json(plan.to_json())):
        with pytest.raises(InputError, match=message):
            dq.load(given)
    with pytest.raises(InputError, match=message):
        dq.load(folder, on_unsupported="skip")


def test_a_method_that_left_every_weight_alone_is_noted_and_loads(copy_of: Copy, model_of) -> None:
    folder = unquantized(copy_of("llama-gqa"))
    plan = dq.plan(folder, on_unsupported="skip")
    assert plan.notes[0].startswith("SKIPPED") and plan.notes[0].endswith("no weight is stored quantized")
    assert plan.quantization_config == {"quant_method": "none"}
    assert dq.fingerprint(dq.load(plan)) == dq.fingerprint(dq.load(model_of("llama-gqa")))


def test_skipped_weights_cannot_be_quantized_again(fp8: Path) -> None:
    with pytest.raises(InputError, match=r"cannot quantize weights that 'eights' has quantized.*Leave quant"):
        dq.plan(fp8, quantization_config="nf4", on_unsupported="skip")
    assert dq.plan(fp8, quantization_config="none", on_unsupported="skip") == dq.plan(fp8, on_unsupported="skip")


def test_a_weight_that_is_really_missing_stays_an_error(fp8: Path) -> None:
    tensors = load_file(fp8 / "model.safetensors")
    for name in ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight_scale_inv", "norm.weight"):
        del tensors[f"model.{name}"]
    save_file(tensors, fp8 / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj\.weight: the checkpoint has no tensor for it") as caught:
        dq.plan(fp8, on_unsupported="skip")
    (problem,) = caught.value.problems  # one cause
    assert "(model.norm.weight)" in problem.what


def test_weights_that_no_method_explains_are_one_message_a_kind(fp8: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())
    del config["quantization_config"]
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is stored as F8_E4M3, which no quantization in config\.json") as caught:
        dq.plan(fp8)
    assert len(caught.value.problems) == 7  # the linear modules of a layer
    assert all("(and 1 more alike: model.layers.1." in problem.what for problem in caught.value.problems)


def test_the_collector_runs_again_after_a_plan(fp8: Path) -> None:
    assert gc.isenabled()
    with pytest.raises(InputError):
        dq.plan(fp8)
    assert gc.isenabled()
