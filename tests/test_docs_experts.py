"""The memory tables of docs/experts.md are those of plans of the real shapes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

import distquant as dq
from distquant.units import format_bytes

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| `([^`]+)` \| (.+) \|$", re.M)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Returns a function that writes a model of a real shape with `benchmarks/shapes.py`."""

    def folder(name: str) -> str:
        target = tmp_path_factory.mktemp("shapes") / name
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "shapes.py"), name, str(target)], check=True)
        return str(target)

    return folder


def table(title: str) -> dict[str, list[str]]:
    """Reads a table of the page: mesh -> its other cells."""
    page = (ROOT / "docs" / "experts.md").read_text()
    (rows,) = re.findall(rf"<!-- table: {title} -->\n(.+?)<!-- end -->", page, re.S)
    return {mesh: cells.split(" | ") for mesh, cells in ROW.findall(rows)}


MEASURED = pytest.mark.skipif(
    "DISTQUANT_BENCHMARKS" not in os.environ, reason="plans 90,000 tensors once more: set DISTQUANT_BENCHMARKS=1"
)


PINNED = re.search(r"^transformers==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.skipif(
    PINNED is None or transformers.__version__ != PINNED[1],
    reason="transformers keeps other tensors in float32: the figures are those of the pinned version",
)
@pytest.mark.parametrize(
    ("name", "quant", "meshes"),
    [
        ("gpt-oss-120b", None, ("tp=1", "ep=2", "tp=2", "ep=4", "ep=2,tp=2", "ep=8", "ep=4,tp=2", "tp=8")),
        ("deepseek-v3", None, ("ep=32,tp=8",)),
        pytest.param("deepseek-v3-bf16", "nf4-dq", ("ep=4,tp=2",), marks=MEASURED),
    ],
)
def test_memory_tables_are_up_to_date(shape, name: str, quant: str | None, meshes: tuple[str, ...]) -> None:
    """All of the first, and a mesh of the others, whose 90,000 tensors take longer."""
    path, rows = shape(name), table(f"{name} {quant}" if quant else name)
    for mesh in meshes:
        memory = dq.plan(path, quantization_config=quant, mesh=mesh).memory
        worst = max(memory, key=lambda row: row.finished)
        sizes = (max(row.read for row in memory), worst.quantized, worst.unquantized, worst.finished)
        assert rows[mesh] == [str(len(memory)), *map(format_bytes, sizes)], mesh
