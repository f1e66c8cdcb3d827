"""A saved adapter on a loaded model gives the logits that transformers and PEFT give, at every width."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import work
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import distquant as dq

ROUNDING = 5e-5
IDS = torch.tensor(work.IDS)
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head")


def save_adapter(model: str, folder: Path, targets: tuple[str, ...] = TARGETS, **options: Any) -> Path:
    """A saved adapter of random values, none of them zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(model_of, tmp_path_factory) -> Path:
    return save_adapter(model_of("llama-gqa"), tmp_path_factory.mktemp("adapter"))


def adapted(path: str, quant: Any, mesh: str | None, adapter: Any) -> tuple[Tensor, str, int]:
    """Logits with an adapter, the fingerprint, and how many parameters train."""
    model = dq.load(path, quant, mesh=mesh, dtype="float32", adapter=adapter)
    with torch.no_grad():
        logits = model(IDS).logits
    return logits, dq.fingerprint(model), sum(parameter.requires_grad for parameter in model.parameters())


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_logits_are_those_of_transformers(model_of, adapter) -> None:
    path = model_of("llama-gqa")
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        without = theirs(IDS).logits
        theirs.load_adapter(str(adapter))
        expected = theirs(IDS).logits
    logits, fingerprint, trainable = adapted(path, None, None, adapter)
    assert off(without, expected) > 0.1, "the adapter must matter"
    assert torch.equal(logits, expected)
    assert trainable == 0
    assert fingerprint == adapted(path, None, None, None)[1], "the base keeps its bits"


@pytest.mark.parametrize("quant", ["none", "nf4", "fp8-row"])
@pytest.mark.parametrize("width", [2, 4])
def test_widths_give_the_same_logits(ranks, model_of, adapter, quant, width) -> None:
    path, quant = model_of("llama-gqa"), work.bnb(quant) if quant == "nf4" else quant
    if width == 4:  # kv heads are repeated there
        adapter = save_adapter(path, adapter.parent / "adapter-of-four", ("q_proj", "o_proj", "down_proj"))
    whole, fingerprint, _ = adapted(path, quant, None, adapter)
    for logits, theirs, _ in ranks.run(width, adapted, path, quant, f"tp={width}", adapter):
        assert off(logits, whole) < ROUNDING
        assert theirs == fingerprint


def test_packed_projections(ranks, model_of, tmp_path) -> None:
    path = model_of("phi3-packed")
    adapter = save_adapter(path, tmp_path / "adapter", ("qkv_proj", "o_proj", "gate_up_proj"))
    whole, _, _ = adapted(path, work.bnb("nf4"), None, adapter)
    for logits, _, _ in ranks.run(2, adapted, path, work.bnb("nf4"), "tp=2", adapter):
        assert off(logits, whole) < ROUNDING


class TestBesideTheModel:
    """An adapter in the folder of a whole model, as huggingface/peft#1381 has it."""

    @pytest.fixture
    def folder(self, copy_of, adapter) -> Path:
        folder = copy_of("llama-gqa")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter / name, folder / name)
        return folder

    def test_a_load_asks_which_is_meant(self, folder) -> None:
        with pytest.raises(dq.InputError, match=r"adapter: .*an adapter beside it.*--adapter .*--no-adapter") as caught:
            dq.load(folder)
        assert len(caught.value.problems) == 1

    def test_a_plan_says_so_in_a_note(self, folder) -> None:
        assert any("lies an adapter" in note for note in dq.plan(folder).notes)

    def test_none(self, folder, model_of) -> None:
        expected, fingerprint, _ = adapted(model_of("llama-gqa"), None, None, None)
        logits, found, _ = adapted(str(folder), None, None, False)
        assert torch.equal(logits, expected) and found == fingerprint

    def test_the_one_beside_it(self, folder) -> None:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # which applies it
        with torch.no_grad():
            expected = theirs(IDS).logits
        assert torch.equal(adapted(str(folder), None, None, folder)[0], expected)

    def test_ranks_ask_as_well(self, ranks, folder) -> None:
        for error in ranks.run(2, error_of_load, str(folder), None):
            assert isinstance(error, dq.InputError) and "--no-adapter" in str(error)


def error_of_load(path: str, adapter: Any) -> BaseException | None:
    return work.error_of(dq.load, path, mesh="tp=2", adapter=adapter)


class TestRefused:
    def test_folder_without_an_adapter(self, model_of, tmp_path) -> None:
        with pytest.raises(dq.InputError, match=r"holds no adapter that can be read.*adapter_config\.json and adapter_"):
            dq.load(model_of("llama-gqa"), adapter=tmp_path)

    def test_adapter_of_another_model(self, model_of, adapter) -> None:
        with pytest.raises(dq.InputError, match=r"adapter: .* cannot be applied .*size mismatch"):
            dq.load(model_of("llama-96"), adapter=adapter)

    def test_adapter_of_another_model_on_ranks(self, ranks, model_of, adapter) -> None:
        for error in ranks.run(2, error_of_load, model_of("llama-96"), adapter):
            assert isinstance(error, dq.InputError) and "cannot be applied" in str(error)

    def test_tensors_that_have_no_place(self, model_of, adapter, tmp_path) -> None:
        """Its configuration says less than its file."""
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
        with pytest.raises(dq.InputError, match="has tensors that the model has no place for"):
            dq.load(model_of("llama-gqa"), adapter=folder)

    def test_tensors_that_are_not_there(self, model_of, adapter, tmp_path) -> None:
        folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        config = json.loads((folder / "adapter_config.json").read_text())
        targets = [*config["target_modules"], "up_proj"]
        (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
        with pytest.raises(dq.InputError, match="has no tensors for: .*up_proj"):
            dq.load(model_of("llama-gqa"), adapter=folder)

    def test_device_map_with_the_disk(self, model_of, adapter) -> None:
        with pytest.raises(dq.InputError, match="adapter cannot be applied to modules on disk"):
            dq.load(model_of("llama-gqa"), device_map={"": "disk"}, adapter=adapter)

    @pytest.mark.parametrize("value", [True, "", 3])
    def test_values(self, model_of, value) -> None:
        with pytest.raises(dq.InputError, match="adapter: invalid adapter"):
            dq.load(model_of("llama-gqa"), adapter=value)
