"""Every module of kernels offers what the protocol says, with the reference's own parameters."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch

from distquant.kernels import reference, with_bitsandbytes
from distquant.kernels.protocol import Kernels

FUNCTIONS = {name: function for name, function in vars(Kernels).items() if inspect.isfunction(function)}
FUNCTIONS = {name: function for name, function in FUNCTIONS.items() if not name.startswith("_")}


def modules() -> list[ModuleType]:
    found = [reference, with_bitsandbytes]
    cpu, gpu = (pytest.importorskip(f"distquant.kernels.{name}", exc_type=ImportError) for name in ("cpu", "gpu"))
    return [*found, cpu, gpu]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_are_the_references(name: str) -> None:
    _, *expected = inspect.signature(FUNCTIONS[name]).parameters.values()
    found = inspect.signature(getattr(reference, name)).parameters.values()
    default = {p.name: torch.float32 if p.default is ... else p.default for p in expected}  # the protocol has no torch
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, default[p.name]) for p in expected]


def test_every_module_has_every_function() -> None:
    for module in modules():
        assert FUNCTIONS.keys() <= vars(module).keys(), module.__name__


def test_a_module_takes_the_same_parameters() -> None:
    for module in modules():
        for name, function in FUNCTIONS.items():
            if module is with_bitsandbytes and getattr(module, name).__name__ == "absent":
                continue
            expected = [p.name for p in inspect.signature(function).parameters.values()][1:]
            assert [*inspect.signature(getattr(module, name)).parameters] == expected, f"{module.__name__}.{name}"
