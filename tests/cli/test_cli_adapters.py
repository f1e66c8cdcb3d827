"""`load` on a folder of a whole model and an adapter asks which is meant, and prints notes after its three lines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runs import Command, tells
from safetensors.torch import save_file

from distquant.loading import loader


@pytest.fixture
def folder(kjv_tiny: str, tmp_path: Path) -> Path:
    """The trained example with an adapter of its first queries."""
    folder = Path(shutil.copytree(kjv_tiny, tmp_path / "tuned"))
    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{prefix}A.weight": torch.ones(2, size), f"{prefix}B.weight": torch.ones(size, 2)},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "target_modules": "model.layers.0.self_attn.q_proj",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_load_asks(folder: Path, refused: Command) -> None:
    done = refused("load", folder)
    assert len(done.problems) == 1
    assert f"--adapter {folder}" in done.problems[0] and "--no-adapter" in done.problems[0]


@pytest.mark.parametrize("flags", [("--no-adapter",), ("--adapter", "FOLDER")])
def test_either_is_taken(folder: Path, command: Command, flags: tuple[str, ...]) -> None:
    given = [str(folder) if flag == "FOLDER" else flag for flag in flags]
    done = command("load", folder, *given, "--prompt", "In the beginning", "--raw")
    assert done.code == 0, done.err
    assert "note: beside the model lies an adapter" in done.err
    plain = "In the beginning" in done.out
    assert plain and "fingerprint" in done.out


def cut(folder: Path) -> None:
    os.truncate(folder / "adapter_model.safetensors", 200)


def grow(folder: Path) -> None:
    with open(folder / "adapter_model.safetensors", "ab") as file:
        file.write(b"more")


def no_object(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[]")


def deep(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("[" * 100_000)


def pipe(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (cut, r"adapter_model\.safetensors: .*200 bytes.*\. Copy or download the adapter again"),
        (grow, r"adapter_model\.safetensors: file is \d+ bytes long, and its last tensor ends at"),
        (no_object, "holds no adapter that can be read"),
        (deep, "holds no adapter that can be read"),
    ],
)
def test_a_damaged_adapter(damage: Callable, told: str, folder: Path, refused: Command) -> None:
    damage(folder)
    tells(refused("load", folder, "--adapter", folder), f"^adapter: .*{told}")


@pytest.mark.parametrize("damage", [cut, pipe])
def test_an_adapter_that_is_damaged_meanwhile(damage: Callable, folder: Path, refused: Command, monkeypatch) -> None:
    """The libraries would die of a file that is cut short, and wait for a pipe."""
    apply = loader.apply_adapter

    def damaged(*arguments: object) -> None:
        damage(folder)
        apply(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "apply_adapter", damaged)
    tells(refused("load", folder, "--adapter", folder), r"^adapter: .*cannot be applied \(.*\)\. Check")
