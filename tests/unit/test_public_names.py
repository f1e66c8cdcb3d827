"""Names of the package: `dir`, `help`, and functions that are commands, too."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest
from torch import nn

import distquant as dq
from distquant.cli.functions import Text


def test_dir_is_the_api() -> None:
    assert set(dir(dq)) == set(dq.__all__)
    for name in dir(dq):
        assert getattr(dq, name) is not None


def test_help_shows_the_api_and_nothing_else() -> None:
    text = pydoc.plain(pydoc.render_doc(dq))
    functions = text[text.index("\nFUNCTIONS") : text.index("\nVERSION")]
    shown = set(re.findall(r"^    (?:\w+ = )?(\w+)\(", functions, re.MULTILINE))
    classes = text[text.index("\nCLASSES") : text.index("\nFUNCTIONS")]
    shown |= set(re.findall(r"^    class (\w+)", classes, re.MULTILINE))
    assert shown == set(dq.__all__) - {"ray", "__version__", "from_pretrained"}
    assert "\nDATA" not in text.replace("\nDATA\n    __all__", "")


def test_from_pretrained_is_load() -> None:
    assert dq.from_pretrained is dq.load


def test_fingerprint_of_another_model_says_what_it_needs() -> None:
    with pytest.raises(dq.InputError, match=r"^model: Linear was not loaded by distquant, .*\. Give the model that"):
        dq.fingerprint(nn.Linear(2, 2))


def test_inspect_and_doctor_are_texts(kjv_tiny: str) -> None:
    text = dq.inspect(kjv_tiny)
    assert isinstance(text, Text)
    assert repr(text) == text
    assert text.startswith("LlamaForCausalLM (llama) in ")
    assert "BF16" in text
    assert repr(dq.doctor("NF4")).splitlines()[-1] != ""
    assert "nf4, nf4-dq" in dq.doctor("4bit")


def test_save_writes_what_transformers_loads(kjv_tiny: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = dq.load(kjv_tiny, "nf4")
    dq.save(model, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(again.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert dq.fingerprint(dq.load(tmp_path / "saved")) == dq.fingerprint(model)


def test_save_of_another_model_says_what_works() -> None:
    with pytest.raises(dq.InputError, match=r"^model: Linear was not loaded by distquant\. Call its own save"):
        dq.save(nn.Linear(2, 2), "nowhere")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_was_asked_for_is_in_force(kjv_tiny: str, attention: str) -> None:
    model = dq.load(kjv_tiny, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {attention}
    assert model.distquant.plan.attn_implementation == attention
    of_plan = dq.load(dq.plan(kjv_tiny, attn_implementation=attention))
    assert of_plan.config._attn_implementation == attention


def test_attention_that_cannot_be_used(kjv_tiny: str) -> None:
    with pytest.raises(dq.InputError, match=r"^attn_implementation: transformers cannot use 'flash' \(.*Give 'sdpa'"):
        dq.plan(kjv_tiny, attn_implementation="flash")


def test_cached_ids_are_looked_up_in_the_folder_that_is_given(kjv_tiny: str, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / "abc").symlink_to(kjv_tiny)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert dq.plan("org/tiny", cache_dir=tmp_path).model.endswith("snapshots/abc")
    assert "LlamaForCausalLM" in dq.inspect("org/tiny", cache_dir=str(tmp_path))
    with pytest.raises(dq.InputError, match=r"is not in the Hugging Face cache .*`hf download org/other --cache-dir /"):
        dq.plan("org/other", cache_dir=tmp_path)
