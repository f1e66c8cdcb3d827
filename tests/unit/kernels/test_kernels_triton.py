"""Triton kernels without a GPU: their results in Triton's interpreter, and what they compile to for a real one.

Either needs a process of its own: the interpreter is chosen when Triton is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_cases import cases

TESTS = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def answer(script: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, object]:
    return answer("kernel_cases.py", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.parametrize("name", list(cases()))
def test_a_kernel_in_the_interpreter_is_the_reference(interpreted: dict[str, object], name: str) -> None:
    assert interpreted[name] is None, interpreted[name]


def test_no_case_is_left_out(interpreted: dict[str, object]) -> None:
    assert interpreted.keys() == cases().keys()


@pytest.mark.parametrize("capabilities", ["90", pytest.param("80 100 120", marks=pytest.mark.wide)])
def test_compiled_for_a_gpu_nothing_is_approximate_flushed_fused_or_spilled(tmp_path: Path, capabilities: str) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no backend for NVIDIA GPUs")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = answer("kernel_ptx.py", *capabilities.split(), **environment)
    for capability in capabilities.split():
        for module in ("four_bit", "int8", "fp8", "groups", "mxfp4", "blockwise", "scaled_rows"):
            assert any(name.startswith(f"sm_{capability} ") and f".{module}._encode" in name for name in found), module
    assert not {name: entry for name, entry in found.items() if entry["instructions"] or entry["spilled"]}


@pytest.mark.wide
def test_pieces_of_any_number_of_rows_compile_nothing_after_the_warm_up(tmp_path: Path, kjv_tiny: str) -> None:
    pytest.importorskip("triton.backends.nvidia", reason="this triton has no backend for NVIDIA GPUs")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    methods = ("nf4-dq", "int8", "fp8", "fbgemm_fp8", "int4", "mxfp4", "mxfp8", "quanto-int8", "torchao-int8")
    found = answer("kernel_warmth.py", kjv_tiny, *methods, **environment)
    assert found.keys() == set(methods)
    for method, (warm, later) in found.items():
        assert warm > 0, method
        assert later == 0, method


@pytest.mark.parametrize("line", ["div.full.f32 ", "rcp.approx.ftz.f32 ", "fma.rn.f32 ", "mul.ftz.f32 "])
def test_the_search_knows_what_it_looks_for(line: str) -> None:
    from kernel_ptx import FORBIDDEN

    assert FORBIDDEN.search(f"\t{line}%r1, %r2, %r3;")
    assert not FORBIDDEN.search(
        "\tmul.f32 %r1, %r2, %r3;\n\tdiv.rn.f32 %r1, %r2, %r3;\n\tmad.wide.s32 %rd1, %r1, 4, 0;"
    )


def test_the_search_for_spills_reads_ptxas() -> None:
    from kernel_ptx import SPILLS

    line = (
        "ptxas info    : Function properties\n    40 bytes stack frame, 156 bytes spill stores, 152 bytes spill loads"
    )
    assert SPILLS.findall(line) == ["156", "152"]


def test_tensors_on_a_cpu_are_refused_outside_the_interpreter() -> None:
    code = (
        "import torch\nfrom distquant.kernels import gpu\n"
        "try: gpu.quantize_4bit(torch.ones(64), 64, 'nf4')\nexcept ValueError as error: print(error)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert "a tensor on cpu: GPU kernels need one on a GPU" in done.stdout, done.stderr


def test_nothing_else_imports_triton() -> None:
    code = (
        "import sys, json, distquant.kernels.reference, distquant.quantization\n"
        "print(json.dumps([name for name in sys.modules if name.startswith('distquant.kernels.gpu')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    package = Path(importlib.util.find_spec("distquant").origin).parent  # type: ignore[union-attr, arg-type]
    for path in package.rglob("*.py"):
        if path.parent != package / "kernels" / "gpu":
            lines = path.read_text().splitlines()
            assert not [line for line in lines if line.startswith(("import triton", "from triton"))], path
