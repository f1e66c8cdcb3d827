"""Models that AutoModelForCausalLM does not build: one line that names the wrapper and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import distquant as dq
from distquant.errors import InputError
from distquant.model import build

WRAPPERS = {
    "mistral3": ("Mistral3ForConditionalGeneration", "mistral"),
    "llava": ("LlavaForConditionalGeneration", "llama"),
    "llava_next": ("LlavaNextForConditionalGeneration", "llama"),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", None),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", None),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", None),
    "idefics3": ("Idefics3ForConditionalGeneration", "llama"),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", "qwen2"),
}
"""`model_type` -> class, and the kind of its text model where that has a class of its own."""


@pytest.mark.parametrize("kind", WRAPPERS)
def test_multimodal_wrapper(kind: str, tmp_path: Path) -> None:
    name, text = WRAPPERS[kind]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError) as caught:
        build(tmp_path, None)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"{name} ({kind}) is a multimodal model, which AutoModelForCausalLM")
    assert "AutoModelFor" in problem.fix and "\n" not in str(problem)
    if text is not None:
        assert f"Give a checkpoint of its text model alone (model_type {text!r})" in problem.fix


def test_gemma3_has_a_class_that_is_built(tmp_path: Path) -> None:
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    document = {
        "model_type": "gemma3",
        "text_config": {**text, "vocab_size": 64, "dtype": "float16"},
        "vision_config": vision,
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert str(build(tmp_path, None).dtype) == "torch.float16", "text_config.dtype counts"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("t5", r"T5ForConditionalGeneration \(t5\) is an encoder and a decoder.*AutoModelForSeq2SeqLM"),
        ("distilbert", r"DistilBertForMaskedLM \(distilbert\) is a masked language model"),
    ],
)
def test_other_kinds(kind: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=says):
        build(tmp_path, None)


def test_a_plan_says_it_too(copy_of, tmp_path: Path) -> None:
    folder = copy_of("llama-gqa")
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3"}))
    with pytest.raises(dq.InputError, match="Mistral3ForConditionalGeneration"):
        dq.plan(folder)
