"""The script of the first minutes on a GPU, run on the simulated device: every step, most of them in small."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("first_light.sh")
ROOT = SCRIPT.parents[2]


def rows(text: str) -> list[list[str]]:
    """The cells of the table that the script writes."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.wide
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler (g++)")
def test_the_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    command = [SCRIPT, "--dry-run", "--out", tmp_path, "--seconds", "550", "--methods", "int4"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows((tmp_path / "first-light.md").read_text())
    results = {(step, what): result for step, what, result, _ in found}
    assert {step for step, _ in results} == {"machine", "load", "methods", "ranks", "kernels", "tests", "bandwidth"}
    assert results["load", "load, none"] == "ok"
    assert results["methods", "int4"] == "ok"
    assert results["ranks", "tp=2, none"] == "ok"
    assert results["bandwidth", "gpu_kernels.py"] == "skipped"  # it measures, and there is no GPU
    assert set(results.values()) == {"ok", "skipped"}
    assert (tmp_path / "trace-none.json").stat().st_size > 0


def test_what_cannot_run_here_is_named_and_the_script_fails(tmp_path: Path) -> None:
    import torch

    if torch.accelerator.is_available():
        pytest.skip("for machines without an accelerator")
    command = [SCRIPT, "--out", tmp_path, "--steps", "kernels"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert rows((tmp_path / "first-light.md").read_text()) == [
        ["kernels", "device", "FAILED", "torch finds no accelerator here (--dry-run takes the simulated one)"]
    ]
