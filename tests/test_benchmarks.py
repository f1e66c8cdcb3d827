"""Benchmarks run from end to end on small models: numbers in every cell, and what must not depend on the machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optimum.quanto")

MEASURED = pytest.mark.skipif(
    "DISTQUANT_BENCHMARKS" not in os.environ, reason="runs whole benchmarks for minutes: set DISTQUANT_BENCHMARKS=1"
)

ROOT = Path(__file__).resolve().parents[1]
KJV = ROOT / "examples" / "models" / "kjv-tiny"
NUMBER = re.compile(r"\d+(\.\d+)?")


def page_of(page: Path, *arguments: str | Path, script: str = "methods.py") -> str:
    """What a benchmark writes."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments), "--out", str(page)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return page.read_text()


def row(page: str, name: str, table: str = "") -> list[str]:
    """Cells of a line in the first table, or in that whose head begins so."""
    page = page[page.index(f"| {table}") :]
    line = re.search(rf"^\| {re.escape(name)} \| (.+) \|$", page, re.M)
    assert line is not None, page
    return line.group(1).split(" | ")


@MEASURED
def test_quality(kjv_tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((KJV / "validation.txt").read_text()[:3000])
    names = ("nf4-dq", "quanto-int8", "torchao-int4")
    page = page_of(tmp_path / "page.md", "quality", kjv_tiny, "--text", text, "--only", *names)
    nf4, int8 = (row(page, name) for name in names[:2])
    # 4 bits, a byte for 64 weights, a float32 for 256 of these and one more for each weight matrix
    assert float(nf4[0]) == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=0.02)
    assert 8 < float(int8[0]) < 8.5
    for cells in (nf4, int8):
        bits, tp1, tp2, fingerprint, verdict, *rest = cells
        assert verdict == "equal"
        assert re.fullmatch(r"`[0-9a-f]{8}`", fingerprint)
        assert all(NUMBER.fullmatch(cell) for cell in (bits, tp1, tp2, *rest[:2]))
        assert float(tp1) == pytest.approx(float(tp2), rel=0.01)
    assert nf4[3] != int8[3]
    assert "- `torchao-int4`: quantization_config.quant_type Int4WeightOnlyConfig: " in page


@MEASURED
def test_speed(kjv_tiny, tmp_path):
    names = ("stored:quanto-int8",)
    options = ("--runs", "1", "--work", tmp_path / "work", "--only", *names)
    page = page_of(tmp_path / "page.md", "speed", kjv_tiny, *options)
    for name in names:
        cells = row(page, name)
        assert all(NUMBER.fullmatch(cell) for cell in cells[:5]), cells
        slower = max(map(float, cells[3:5]))
        assert cells[5] in ([] if slower > 1 else ["met"]) + ([] if slower < 1 else ["NOT met"])
        copying, upstream, ratio = float(cells[6]), float(cells[2]), float(cells[7])
        assert ratio == pytest.approx(copying / upstream, abs=0.02)
    assert "Failed:" not in page
    assert [folder.name for folder in (tmp_path / "work").iterdir()] == ["kjv-tiny-quanto-int8"]


def test_unknown_names_are_refused(kjv_tiny):
    command = [sys.executable, str(ROOT / "benchmarks" / "methods.py"), "speed", kjv_tiny, "--only", "nf5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert re.match(r"--only: nf5 not among nf4, ", done.stderr)


@MEASURED
def test_experts(moe_of, kjv_tiny, tmp_path):
    page = page_of(tmp_path / "page.md", moe_of("mixtral"), kjv_tiny, "--runs", "1", script="experts.py")
    for name in ("experts tp=2", "experts ep=2", "dense tp=2"):
        name = f"distquant nf4-dq {name}"
        cells = row(page, name)
        assert all(NUMBER.fullmatch(cell) for cell in (*cells[1:3], *cells[4:6])), cells
        assert row(page, name, "bytes |")[2:] == ["1.0000", "1.00", "met"]
        assert row(page, name, "memory of the worst rank")[-1] == "met"
        for rank in range(2):
            assert row(page, f"{name}, rank {rank}", "bytes of quantized weights")[2:] == [
                "1.0000",
                "1.00 within 1%",
                "met",
            ]
    for rank in range(2):
        own, others, *_, verdict = row(page, f"rank {rank}", "bytes read at ep=2")
        # 4 of 8 experts, 3 projections of 96 x 64 bfloat16 in each of 2 layers
        assert own == f"{4 * 3 * 96 * 64 * 2 * 2:,}"
        assert (others, verdict) == ("0", "met")
    assert row(page, "both", "bytes read at ep=2")[-1] == "1.0000 of the file's tensors"
    # transformers with bitsandbytes leaves the experts as they are
    assert float(row(page, "distquant nf4-dq experts tp=2", "resident")[-1]) > 1
