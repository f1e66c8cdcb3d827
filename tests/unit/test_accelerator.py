"""No backend is named outside of its place, and devices have full names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distquant
from distquant.accelerator import facts
from distquant.accelerator.names import device_name, device_number, first_device

PACKAGE = Path(distquant.__file__).parent
OWN = "accelerator/"
"""Where backends may be named."""
BACKENDS = {"cuda", "xpu", "npu", "mps", "hip"}


def named(code: str) -> Iterator[tuple[int, str]]:
    """Lines that name a backend: `torch.cuda` and its like, or the type of a device as a text of its own."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            if node.attr in BACKENDS:
                yield node.lineno, f"torch.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr == "hip":
            yield node.lineno, "torch.version.hip"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value.strip().partition(":")[0]
            if word in BACKENDS and not any(c.isspace() for c in node.value):
                yield node.lineno, repr(node.value)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.startswith("torch.") and module.split(".")[1] in BACKENDS:
                    yield node.lineno, module


def test_no_backend_is_named_outside_of_its_place() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(OWN):
            found += [f"{name}:{line}: {what}" for line, what in named(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.cuda.is_available()",
        "device.type == 'cuda'",
        "place.startswith('cuda:')",
        "f'cuda:{number}'",
        "from torch.cuda import Stream",
        "torch.version.hip",
        "kind in ('cpu', 'xpu')",
    ],
)
def test_a_backend_is_found_however_it_is_named(code: str) -> None:
    assert list(named(code))


@pytest.mark.parametrize(
    ("value", "kind", "name"),
    [
        (0, None, "cuda:0"), ("1", "cpu", "cuda:1"), (1, "cuda", "cuda:1"), (2, "xpu", "xpu:2"), (0, "sim", "sim:0"),
        ("cuda", None, "cuda:0"), ("xpu", None, "xpu:0"), ("cpu", "cuda", "cpu"), ("disk", "xpu", "disk"),
        ("cuda:3", "xpu", "cuda:3"), ("nowhere", None, "nowhere"),
    ],
)  # fmt: skip
def test_names_of_devices_are_full(value: object, kind: str | None, name: str) -> None:
    assert device_name(value, kind) == name


def test_names_for_accelerate_and_by_users() -> None:
    assert [device_number(name) for name in ("cuda:1", "xpu:0", "sim:0", "cpu", "disk")] == [
        1,
        0,
        "sim:0",
        "cpu",
        "disk",
    ]
    assert [first_device(name) for name in ("GPU", "cuda", "cuda:1", "xpu")] == ["cuda:0", "cuda:0", "cuda:1", "xpu"]


def test_the_cpu_has_no_facts_of_an_accelerator() -> None:
    cpu = torch.device("cpu")
    assert facts.resolved("cpu") == cpu
    assert facts.capability(cpu) is None
    assert not facts.reaches(cpu, (0, 0))
    assert facts.peak_memory(cpu) is None
    facts.reset_peak_memory(cpu)
    assert facts.device_label(cpu) == "cpu"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_without_an_accelerator_ranks_are_on_the_cpu_and_speak_gloo() -> None:
    assert (facts.own_device(), facts.device_count(), facts.group_backend()) == (facts.CPU, 0, "gloo")
