"""docs/architecture.md matches the tree: its picture, its table of packages, and the files that the picture names."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "distquant"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("draw_journey", DOCS / "draw_journey.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def facts(script: Any) -> Any:
    return script.facts()


def test_the_picture_is_up_to_date(script: Any, facts: Any) -> None:
    drawn = script.picture(facts)
    assert (DOCS / "architecture.svg").read_text(encoding="utf-8") == drawn, "run: python docs/draw_journey.py"
    ElementTree.fromstring(drawn)


def test_every_step_names_a_file_of_the_package(script: Any, facts: Any) -> None:
    steps = [*script.planning_steps(facts), *script.loading_steps(facts)]
    assert len(steps) == 13
    assert [step.file for step in steps if not (PACKAGE / step.file).is_file()] == []


def test_every_step_is_described_on_the_page(script: Any, facts: Any) -> None:
    """Compares the numbered list of the page with the steps of the picture, and the numbers in both."""
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    steps = [*script.planning_steps(facts), *script.loading_steps(facts)]
    listed = [title.lower() for title in re.findall(r"^\d+\. \*\*(.+?)\.\*\*", page, re.M)]
    assert listed == [step.title for step in steps]
    numbers = {number for step in steps for line in step.lines for number in re.findall(r"\d+,\d{3}", line)}
    missing = sorted(
        number for number in numbers - {f"{facts.info.offset + facts.info.nbytes:,}"} if number not in page
    )
    assert missing == []


def test_the_table_of_rooms_has_every_package() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## The rooms")
    rows = re.findall(r"^\| \[`(\w+)/`\]", section, re.M)
    assert sorted(rows) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
