"""The examples run as they stand, and a package that nobody here knows brings its own quantization method."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(*arguments: str | Path, **environment: str) -> str:
    """Standard output of a Python process that must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder that the third-party package is installed into, as pip does it, and nothing else."""
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(EXAMPLES / "third_party_scheme", source)
    target = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", target, source)
    return str(target)


def test_first_load(kjv_tiny):
    output = run(EXAMPLES / "first_load.py")
    assert output.startswith("In the beginning of the")
    assert "a projection is now a Linear4bit" in output
    assert re.search(r"^fingerprint [0-9a-f]{32}$", output, re.M)


def test_plan_on_a_laptop():
    """Also shows that planning needs no GPU and that a rank's shortage is told with its arithmetic."""
    output = run(EXAMPLES / "plan_on_a_laptop.py", CUDA_VISIBLE_DEVICES="")
    assert "mesh tp=8 (8 ranks)" in output
    assert "multiples of 32 for gate_proj, up_proj, down_proj" in output
    assert re.search(r"with 64 MiB a rank:\nrank \d \(and 7 more\): needs .* = 80\.\d+ MiB, and 57\.60 MiB", output)


def test_third_party_scheme_has_the_same_bits_at_two_widths(installed, kjv_tiny):
    meshes = ("--mesh", "tp=1", "--mesh", "tp=2")
    output = run("-m", "distquant", "verify", kjv_tiny, "--quant", "int8-g32", *meshes, PYTHONPATH=installed)
    found = re.findall(r"^([0-9a-f]{32})  (tp=\d)", output, re.M)
    assert [mesh for _, mesh in found] == ["tp=1", "tp=2"]
    assert found[0][0] == found[1][0]
    assert output.endswith("equal\n")


def test_third_party_scheme_does_what_it_says(installed, kjv_tiny):
    """Against the definition, written once more: codes, scales and what the module computes."""
    script = """
import sys, torch, distquant as dq
quantized, plain = (dq.load(sys.argv[1], quantization_config=q).model.layers[0].mlp.up_proj for q in ("int8-g32", None))
weight = plain.weight.detach().float()
groups = weight.view(weight.shape[0], -1, 32)
scales = groups.abs().amax(2) / 127
assert type(quantized).__module__ == "int8_groups"
assert torch.equal(quantized.weight_scale, scales)
assert torch.equal(quantized.weight.view_as(groups), (groups / scales.unsqueeze(2)).round().to(torch.int8))
x = torch.randn(3, weight.shape[1])
error = (quantized(x) - torch.nn.functional.linear(x, weight)).norm() / torch.nn.functional.linear(x, weight).norm()
assert 0 < error < 0.01, error
"""
    run("-c", script, kjv_tiny, PYTHONPATH=installed)


def test_without_the_package_its_name_is_unknown(kjv_tiny):
    done = subprocess.run(
        [sys.executable, "-m", "distquant", "plan", kjv_tiny, "--quant", "int8-g32"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown quantization 'int8-g32'" in done.stderr
