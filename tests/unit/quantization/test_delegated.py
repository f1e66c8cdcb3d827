"""Methods that transformers loads itself: checked by us, loaded by it, never cut."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import distquant as dq
from distquant.config import BitnetConfig, HiggsConfig
from distquant.errors import InputError
from distquant.loading import delegated
from distquant.quantization import scheme_for


@pytest.fixture(scope="module")
def bitnet(model_of, tmp_path_factory) -> Path:
    """A ternary checkpoint, packed by transformers' own packer."""
    from transformers.integrations.bitnet import pack_weights

    source, folder = Path(model_of("llama-gqa")), tmp_path_factory.mktemp("bitnet")
    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, value in load_file(file).items():
            if "_proj.weight" not in name:
                tensors[name] = value
                continue
            scale = value.float().abs().mean()
            tensors[name] = pack_weights((value.float() / scale).round().clamp(-1, 1))
            tensors[name + "_scale"] = (1 / scale).reshape(1).to(value.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = BitnetConfig().to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_loads_what_transformers_loads(bitnet):
    from transformers import AutoModelForCausalLM

    model, theirs = dq.load(bitnet), AutoModelForCausalLM.from_pretrained(bitnet)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
    found, expected = model.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    report = model.distquant.report
    assert report.kernel == "transformers: its own quantizer for 'bitnet'"
    assert report.seconds > 0 and report.quantized_bytes > 0
    with pytest.raises(InputError, match="transformers loaded the model with its own quantizer"):
        dq.fingerprint(model)


def test_plan_says_who_loads_it(bitnet):
    plan = dq.plan(bitnet)
    assert any(note.startswith("DELEGATED: transformers loads the model") for note in plan.notes)
    stored = sum(file.stat().st_size for file in bitnet.glob("*.safetensors"))
    assert 0.5 * stored < plan.memory[0].finished <= stored


def test_several_ranks_are_refused_before_anything_is_read(bitnet):
    with pytest.raises(InputError, match=r"mesh: tp=2.*'bitnet'.*cannot partition"):
        dq.plan(bitnet, mesh="tp=2")


def test_everything_missing_is_told_at_once(model_of):
    """HIGGS: two packages and a GPU are missing, and the mesh is too wide."""
    with pytest.raises(InputError) as error:
        dq.load(model_of("llama-gqa"), quantization_config={"quant_method": "higgs"}, mesh="tp=1")
    told = str(error.value)
    assert "pip install" in told and "needs" in told
    with pytest.raises(InputError, match="cannot quantize while loading"):
        dq.plan(model_of("llama-gqa"), quantization_config={"quant_method": "aqlm"})


def test_what_transformers_refuses_is_told_as_that(model_of):
    """A plan of another machine, say: here HIGGS lacks its GPU or its packages."""
    config = HiggsConfig()
    plan = dataclasses.replace(dq.plan(model_of("llama-gqa")), quantization_config=config.to_dict())
    with pytest.raises(InputError, match=r"quantization_config: transformers refuses 'higgs': .*(GPU|FLUTE)"):
        delegated.load(plan, scheme_for(config), torch.device("cpu"))


def test_what_goes_wrong_while_loading_is_told_as_it_is(bitnet, tmp_path):
    """The model's own class raises here, with an error that quantizers raise too."""
    folder = shutil.copytree(bitnet, tmp_path / "model")
    plan = dq.plan(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "nonsense"}))
    with pytest.raises(ValueError, match="nonsense") as caught:
        dq.load(plan)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_files_that_never_end_are_refused_before_transformers_opens_them(bitnet, tmp_path, file):
    """From a plan that was made before: nobody else looks at the files again."""
    folder = Path(shutil.copytree(bitnet, tmp_path / "copy"))
    plan = dq.plan(folder)
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(InputError, match=rf"{re.escape(file)}: cannot be read \(it is a named pipe"):
        dq.load(plan)
