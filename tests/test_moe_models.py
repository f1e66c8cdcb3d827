"""The fixtures themselves: checkpoints that transformers reads, in every form, with the values that they claim."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from moe_models import FAMILIES, FORMS, read_all
from moe_stored import save_stored

import distquant as dq
from distquant.errors import InputError

IDS = torch.tensor([[5, 17, 99, 3, 42, 42, 8, 110], [90, 2, 31, 77, 12, 6, 55, 101]])


def logits(path: str | Path, **kwargs) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **kwargs)(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_are_the_same_model(moe_of, family):
    hub, fused = (logits(moe_of(family, form)) for form in FORMS)
    assert torch.equal(hub, fused)
    assert hub.std() > 0.5, "logits near zero would hide differences"


@pytest.mark.parametrize(
    ("family", "name"), [("mixtral", "experts.7.w3.weight"), ("olmoe", "experts.10.up_proj.weight")]
)
def test_hub_form_has_a_tensor_for_each_expert_in_several_files(moe_of, family, name):
    hub, fused = (Path(moe_of(family, form)) for form in FORMS)
    assert [key for key in read_all(hub) if key.endswith(name)]
    assert not [key for key in read_all(fused) if key.endswith(name)]
    assert len(list(hub.glob("*.safetensors"))) > 1


@pytest.mark.parametrize("changes", ["down_proj", "gate_up_proj", "router"])
def test_every_part_of_the_experts_matters(moe_of, tmp_path, changes):
    """Of a family with biases; a change of one expert shows in the logits."""
    from moe_models import changed

    def change(tensors):
        for name in tensors:
            if changes in name:
                tensors[name][1] += 0.5

    path = moe_of("gpt-oss")
    assert not torch.allclose(logits(path), logits(changed(path, tmp_path / "changed", change)), rtol=1e-3)


def test_mxfp4_means_what_transformers_reads_in_it(moe_of, tmp_path):
    """Values are compared, not logits: transformers 5.17 leaves the dequantized experts in bfloat16."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    stored, twin = save_stored("mxfp4", Path(moe_of("gpt-oss")), tmp_path / "mxfp4")
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    theirs = load(stored, quantization_config=Mxfp4Config(dequantize=True)).state_dict()
    own = load(twin).state_dict()
    assert theirs.keys() == own.keys()
    for name, value in own.items():
        assert torch.equal(theirs[name].float(), value), name


def test_quantized_weights_have_one_fingerprint_in_every_version_of_transformers(moe_of):
    """Its routers are float32 since 5.24, bfloat16 before. The digits were found with 5.17, 5.23 and 5.24."""
    model = dq.load(moe_of("deepseek-v3"), quantization_config="nf4")
    assert dq.fingerprint(model, quantized_only=True) == "f51d099257d1f37deada5c26e3c4d467"
    assert dq.fingerprint(model) != dq.fingerprint(model, quantized_only=True)


@pytest.mark.parametrize("quant", ["nf4", "fp8"])
def test_fingerprint_of_quantized_weights_does_not_depend_on_the_dtype_of_others(moe_of, monkeypatch, quant):
    """Of the same checkpoint, where transformers forces float32 on norms as well, and where it does not."""
    from transformers import DeepseekV3PreTrainedModel

    found = []
    for forced in (["e_score_correction_bias"], ["e_score_correction_bias", "input_layernorm"]):
        plan = dict.fromkeys(forced, torch.float32)
        monkeypatch.setattr(DeepseekV3PreTrainedModel, "_get_dtype_plan", lambda self, dtype, plan=plan: plan)
        model = dq.load(moe_of("deepseek-v3"), quantization_config=quant)
        assert model.model.layers[1].input_layernorm.weight.dtype == (
            torch.float32 if len(forced) > 1 else torch.bfloat16
        )
        found.append((dq.fingerprint(model, quantized_only=True), dq.fingerprint(model)))
    (first, whole), (second, other) = found
    assert first == second
    assert whole != other, "the whole fingerprint tells dtypes apart"


def test_fingerprint_of_quantized_weights_sees_a_code(moe_of):
    model = dq.load(moe_of("deepseek-v3"), quantization_config="nf4")
    before = dq.fingerprint(model, quantized_only=True)
    model.model.layers[0].self_attn.o_proj.weight.data[5] ^= 1
    assert dq.fingerprint(model, quantized_only=True) != before
    model.model.layers[0].self_attn.o_proj.weight.data[5] ^= 1
    model.model.norm.weight.data += 1
    assert dq.fingerprint(model, quantized_only=True) == before


def test_no_fingerprint_of_quantized_weights_where_there_are_none(moe_of):
    model = dq.load(moe_of("deepseek-v3"))
    with pytest.raises(InputError, match="quantized_only: the model has no quantized weights"):
        dq.fingerprint(model, quantized_only=True)
