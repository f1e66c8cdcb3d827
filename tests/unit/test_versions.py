"""Versions that packages are installed in: those that are tested, and none beyond, of what distquant builds on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from distquant.quantization.registry import discover

REPOSITORY = Path(__file__).resolve().parents[2]


def requirement(name: str) -> Requirement:
    """What `pyproject.toml` asks of a package."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf'^    "({name}\b[^"]*)",$', text, re.MULTILINE)
    assert found, f"pyproject.toml does not require {name}"
    return Requirement(found[1])


@pytest.mark.parametrize(
    ("name", "tested", "untried"), [("torch", "2.14.1", "2.15.0"), ("transformers", "5.24.0", "5.25.0")]
)
def test_nobody_gets_a_version_that_was_never_tried(name: str, tested: str, untried: str) -> None:
    asked = requirement(name).specifier
    pinned = re.search(rf"^{name}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned and asked.contains(pinned[1])
    assert asked.contains(tested)
    assert not asked.contains(untried)


def extras() -> dict[str, Requirement]:
    """What the extras of `pyproject.toml` ask of each package."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project\.optional-dependencies\]\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert section
    found = [Requirement(asked) for asked in re.findall(r'"([^"]+)"', section[1])]
    return {asked.name: asked for asked in found if asked.name != "distquant"}


FLOORS = {package: least for scheme in discover().values() for package, least in scheme.requires.items()}
"""What the schemes need: the one source of these versions."""


@pytest.mark.parametrize("package", sorted(FLOORS.keys() & extras().keys()))
def test_extras_ask_for_what_the_schemes_need(package: str) -> None:
    (asked,) = extras()[package].specifier
    assert asked.operator == ">="
    assert Version(asked.version) == Version(FLOORS[package])


def test_the_libraries_of_the_methods_are_extras() -> None:
    assert {"bitsandbytes", "torchao", "optimum-quanto", "hqq", "gguf"} <= FLOORS.keys() & extras().keys()


def test_schemes_agree_on_a_package() -> None:
    for scheme in discover().values():
        for package, least in scheme.requires.items():
            assert Version(FLOORS[package]) == Version(least), f"{scheme.name}: {package}"
