"""docs/layouts.md shows the present declarations of every method that distquant partitions itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from distquant.quantization.registry import discover

DOCS = Path(__file__).resolve().parents[2] / "docs"
REMEDY = "run: python docs/draw_layouts.py"
METHODS = sorted(
    name for name, kind in discover().items() if kind.__module__.startswith("distquant.") and not kind.delegated
)


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("draw_layouts", DOCS / "draw_layouts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "layouts.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_the_picture_is_what_the_script_draws(script, method):
    drawn = script.picture(method)
    assert (DOCS / "layouts" / f"{method}.svg").read_text(encoding="utf-8") == drawn, REMEDY
    ElementTree.fromstring(drawn)


@pytest.mark.parametrize("method", METHODS)
def test_there_is_a_section_with_picture_and_table(page, method):
    _, _, section = page.partition(f": `{method}`\n")
    section, _, _ = section.partition("\n## ")
    assert f"(layouts/{method}.svg)" in section
    assert f"<!-- table: {method} -->\n| component" in section


def test_tables_are_what_the_schemes_declare(script, page):
    assert script.with_tables(page) == page, REMEDY


def test_no_picture_is_left_over(script):
    assert sorted(script.EXAMPLES) == METHODS
    assert sorted(path.stem for path in (DOCS / "layouts").iterdir()) == METHODS


def test_a_table_would_not_stay_wrong(script, page):
    """The comparison above can fail: a changed alignment is put right."""
    wrong = page.replace("| 16, else 1 |", "| 17 |", 1)
    assert wrong != page
    assert script.with_tables(wrong) == page
