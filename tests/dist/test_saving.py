"""A whole model is saved as `from_pretrained` reads it, or not at all; and it trains with transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import work
import wrapping

import distquant as dq
from distquant.quantization import config_classes

READ = {"none": 0, "fp4": 0, "fp4-dq": 0, "nf4": 0, "nf4-dq": 0, "int8": 0, "fp8": 0, "fp8-tensor": 0, "mxfp8": 0}
READ |= {"int4": 0, "int4-g64": 0, "int4-g32": 0, "torchao-fp8": 0, "torchao-int8": 0, "fp8-row": 0.1}
"""Methods whose saved models transformers reads here -> by how much logits may differ (fp8-row: it rounds activations)."""
REFUSED = ("hqq", "hqq-g128", "hqq-g32", "quanto-int4", "quanto-int8", "mxfp4")
OF_GROUPS = {f"{name}-g{size}" for name in ("gptq-rtn", "awq-rtn") for size in (64, 32)}
ELSEWHERE = {"gptq-rtn", "awq-rtn", "fbgemm_fp8", "torchao-int4", "nvfp4"} | OF_GROUPS
"""Methods whose saved models transformers reads with other packages or a GPU only (or that need one to be made)."""
TRAINED = sorted({*READ, *REFUSED, "gptq-rtn", "awq-rtn", "fbgemm_fp8"} - {"none"})


def test_every_method_is_listed():
    names = {name for cls in config_classes() for name in cls.short_names}
    assert names == {*READ, *REFUSED} | ELSEWHERE


@pytest.mark.parametrize("name", READ)
def test_transformers_reads_what_is_saved(model_of, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = work.exact(model_of("qwen2-biases"), name)
    model.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(found.values()), found
    ids = torch.tensor(work.IDS)
    again.train(name[:3] in ("nf4", "fp4"))  # in training mode bitsandbytes does not repack 4 bits on a CPU
    with torch.no_grad():
        ours, theirs = model(ids).logits, again(ids).logits
    assert (ours - theirs).abs().max() / ours.abs().max() <= READ[name] + 1e-5


DATA = Path(__file__).parents[1] / "data"
STORED = ["compressed_tensors/fp8-block", "compressed_tensors/fp8-static", "compressed_tensors/int4"]
STORED += ["compressed_tensors/int8-naive", "compressed_tensors/int8-w8a8", "compressed_tensors/mixed", "fp8/blocks"]
STORED += ["compressed_tensors/unquantized", "fp8/deepseek-v3", "fp8/tensor", "fp8/ue8m0", "mxfp8", "torchao/fp8-row"]
STORED += ["torchao/fp8-tensor", "torchao/int4-group", "torchao/int8-row", "torchao/int8-tensor"]
"""Checkpoints of other tools that transformers reads here."""
STORED_REFUSED = ["hqq/2-bits-strided", "hqq/4-bits", "quanto/float8", "quanto/int2", "quanto/int4", "quanto/int8"]
STORED_ELSEWHERE = ["compressed_tensors/int4-zeros", "auto_round/auto_gptq", "awq/gemm", "fbgemm_fp8", "gptq/v1-4bit", "gptq/v2-3bit-act-order"]
"""Those that it reads with other packages, a GPU, or `run_compressed=False` only: distquant reads back what it saves."""


def test_every_stored_checkpoint_is_listed():
    there = {str(file.parent.relative_to(DATA)) for file in DATA.glob("**/config.json")}
    assert there == {*STORED, *STORED_REFUSED, *STORED_ELSEWHERE}


@pytest.mark.parametrize("name", STORED)
def test_stored_checkpoint_is_saved_as_it_came(tmp_path, name):
    """transformers computes with what was saved as with the original, to the bit."""
    from transformers import AutoModelForCausalLM

    model, logits = dq.load(DATA / name), []
    model.save_pretrained(tmp_path)
    assert name.endswith("unquantized") or model.hf_quantizer.is_serializable()
    for path in (DATA / name, tmp_path):
        again, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, dtype="auto")
        assert not any(found.values()), found
        with torch.no_grad():
            logits.append(again(torch.tensor(work.IDS) % again.config.vocab_size).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", STORED_ELSEWHERE)
def test_stored_checkpoint_that_is_saved_loads_again(tmp_path, name):
    model = dq.load(DATA / name)
    model.save_pretrained(tmp_path)
    assert dq.fingerprint(dq.load(tmp_path)) == dq.fingerprint(model)


@pytest.mark.parametrize("name", STORED_REFUSED)
def test_stored_checkpoint_that_transformers_does_not_read_is_not_saved(tmp_path, name):
    model = dq.load(DATA / name)
    assert_not_saved(model, tmp_path / "saved")
    assert not model.hf_quantizer.is_serializable()


def assert_not_saved(model, folder: Path) -> None:
    with pytest.raises(dq.InputError, match=r"^save_pretrained: transformers [^\n]*\. Keep the checkpoint[^\n]*$"):
        model.save_pretrained(folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_does_not_read_is_not_saved(model_of, tmp_path, name):
    path = model_of("qwen2-biases")
    model = work.exact(path, name)
    assert_not_saved(model, tmp_path / "saved")
    assert not model.hf_quantizer.is_serializable()
    assert dq.fingerprint(work.exact(path, name)) == dq.fingerprint(model)  # as the message says


def test_a_gguf_model_is_not_saved(tmp_path):
    assert_not_saved(dq.load(Path(__file__).parents[1] / "data" / "gguf" / "tiny.gguf"), tmp_path / "saved")


@pytest.mark.parametrize("name", TRAINED)
def test_trainer_trains_adapters(model_of, name):
    from peft import LoraConfig, get_peft_model

    model = work.exact(model_of("olmo2"), name)
    before = dq.fingerprint(model)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    first, second = wrapping.trained(peft, 8, 2)
    assert second < first
    assert dq.fingerprint(model) == before


def test_trainer_refuses_quantized_weights_without_adapters(model_of):
    with pytest.raises(ValueError, match="purely quantized"):
        wrapping.trained(work.exact(model_of("qwen2-biases"), "fp8"), 8)
