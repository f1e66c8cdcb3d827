"""Several mistakes at once: one message tells all of them, and nothing that only follows from another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from cli_runs import COMMANDS, Command, tells


@COMMANDS
def test_all_problems_are_in_one_message(name: str, kjv_tiny: str, tmp_path: Path, refused: Command) -> None:
    folder = Path(shutil.copytree(kjv_tiny, tmp_path / "spoiled"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    os.truncate(folder / "model-00003-of-00003.safetensors", 4)
    wrong = ["--mesh", "pt=2", "--quant", "nf5", "--staging", "much", "--max-memory", "lots", "--dtype", "int3"]
    done = refused(name, folder, *wrong)
    assert done.code == 2
    assert done.message.startswith("7 problems:")
    expected = ["mesh", "staging", "dtype", "max_memory", "quantization_config", "model-00002", "model-00003"]
    assert sorted(map(str, expected)) == sorted(
        next(word for word in expected if problem.startswith(word)) for problem in done.problems
    )


@COMMANDS
def test_problems_of_model_and_method_are_told_together(
    name: str, gpt2: str, refused: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distquant.runtime.measure.packages", dict)
    quant = '{"load_in_4bit": true, "llm_int8_skip_modules": ["lm_haed"]}'
    done = refused(name, gpt2, "--mesh", "tp=2", "--quant", quant)
    assert done.code == 2
    assert [problem.split(":")[0] for problem in done.problems] == ["skipped modules", "environment", "mesh"]


def test_a_guess_after_a_typo_adds_no_problem(kjv_tiny: str, refused: Command) -> None:
    """A mesh that cannot be read is planned on as one rank: that this would be too big for memory is no problem."""
    done = refused("plan", kjv_tiny, "--mesh", "pt=8", "--max-memory", "514MiB", "--staging", "512MiB")
    tells(done, r"^mesh: 'pt=8'")


def test_mesh_that_fits_no_runtime_is_told_with_the_rest(kjv_tiny: str, refused: Command) -> None:
    done = refused("load", kjv_tiny, "--mesh", "tp=2", "--runtime", "local", "--quant", "nf5")
    assert [problem.split(":")[0] for problem in done.problems] == ["mesh", "quantization_config"]
