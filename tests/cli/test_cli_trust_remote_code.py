"""Code that comes with a checkpoint: run only when asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import COMMANDS, Command, tells


@pytest.fixture
def with_code(model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama of a type of its own, with the code for it; running that code leaves a mark."""
    folder = Path(shutil.copytree(model_of("llama-gqa"), tmp_path / "with_code"))
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "code.MyConfig", "AutoModelForCausalLM": "code.MyLlama"}
    config.update(model_type="my_llama", architectures=["MyLlama"], auto_map=code)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({str(tmp_path / "mark")!r}).touch()

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyLlama(LlamaForCausalLM):
    config_class = MyConfig
""")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@COMMANDS
def test_code_of_a_checkpoint_is_not_run_unasked(name: str, with_code: Path, tmp_path: Path, refused: Command) -> None:
    tells(refused(name, with_code), r"with_code: .*custom code.*\. Read the model's code, .*\(--trust-remote-code\)")
    assert not (tmp_path / "mark").exists()


def test_code_of_a_checkpoint_is_run_when_asked_for(with_code: Path, tmp_path: Path, command: Command) -> None:
    done = command("load", with_code, "--trust-remote-code", "--quant", "nf4")
    assert done.code == 0
    assert "fingerprint" in done.out
    assert (tmp_path / "mark").exists()
