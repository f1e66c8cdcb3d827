"""Versions that packages are installed in: those that are tested, and none beyond, of what distquant builds on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]


def requirement(name: str) -> Requirement:
    """What `pyproject.toml` asks of a package."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'^    "({name}\b[^"]*)",$', text, re.MULTILINE)
    assert found, f"pyproject.toml does not require {name}"
    return Requirement(found[1])


@pytest.mark.parametrize(
    ("name", "tested", "untried"), [("torch", "2.13.0", "2.14.0"), ("transformers", "5.24.0", "5.25.0")]
)
def test_nobody_gets_a_version_that_was_never_tried(name: str, tested: str, untried: str) -> None:
    asked = requirement(name).specifier
    pinned = re.search(rf"^{name}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned and asked.contains(pinned[1])
    assert asked.contains(tested)
    assert not asked.contains(untried)
