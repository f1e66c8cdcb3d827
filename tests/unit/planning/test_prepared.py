"""What a rank opens while it waits for the plan: nothing that is invalid, and nothing that hides a defect."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import distquant as dq
from distquant.planning.prepared import open_early
from distquant.planning.request import Request

Copy = Callable[[str], Path]


def test_a_valid_checkpoint_is_opened_and_fits_its_plan(model_of: Callable[[str], str]) -> None:
    request = Request(model=model_of("llama-gqa"))
    prepared = open_early(request)
    assert prepared is not None
    assert prepared.checkpoint.tensors
    plan = dq.plan(model_of("llama-gqa"))
    assert prepared.fits(plan, request)
    assert not prepared.fits(replace(plan, dtype="float32"), request)
    assert not prepared.fits(dq.plan(model_of("llama-tied")), request)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4)


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))


@pytest.mark.parametrize("spoil", [no_config, cut_short, unknown_type])
def test_what_rank_0_will_report_is_left_to_it(spoil: Callable[[Path], None], copy_of: Copy) -> None:
    folder = copy_of("llama-gqa")
    spoil(folder)
    assert open_early(Request(model=folder)) is None
    with pytest.raises(dq.InputError):
        dq.plan(folder)


def test_an_id_waits_for_the_plan() -> None:
    assert open_early(Request(model="org/name")) is None


def test_a_defect_is_raised(copy_of: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of code that comes with the checkpoint: what libraries raise for invalid input is not among it."""
    folder = copy_of("llama-gqa")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "code.BrokenConfig", "AutoModelForCausalLM": "code.Broken"}
    config.update(model_type="broken_llama", architectures=["Broken"], auto_map=code)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("""
from transformers import LlamaConfig, LlamaForCausalLM

class BrokenConfig(LlamaConfig):
    model_type = "broken_llama"

class Defect(Exception):
    pass

class Broken(LlamaForCausalLM):
    config_class = BrokenConfig

    def __init__(self, config):
        raise Defect("a defect of this code")
""")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(Exception, match=r"^a defect of this code"):
        open_early(Request(model=folder, trust_remote_code=True))
