"""Every method, on any devices and ranks, has the CPU's bits and answers; with few slots, and slow copies."""

from __future__ import annotations

from typing import Any

import loads
import pytest
from apart import Apart

METHODS: dict[str, Any] = {
    name: name
    for name in (
        "none", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int4-g64", "fp8", "fp8-row", "fp8-tensor", "fbgemm_fp8",
        "mxfp4", "mxfp8", "hqq", "gptq-rtn-g32", "awq-rtn-g32", "quanto-int8", "quanto-int4", "torchao-int8",
        "torchao-fp8",
    )
}  # fmt: skip
FEW, SLOW = "128KiB", 3e-4
"""Staging that a rank soon runs out of, and seconds that a copy takes."""

GOOD = {"equal": True, "faults": [], "still pinned": 0}
RANKS = {"tp=2": 8, "tp=4": 8, "tp=4 on two nodes": 2, "dp=2": 8}
"""Mesh -> ranks of a node."""


@pytest.mark.parametrize("method", ["none", "nf4-dq", "fp8-tensor"])
def test_some_methods_over_two_devices(sim: Apart, model_of, method):
    found = sim(loads.on_devices, model_of("llama-gqa"), METHODS[method], 2, FEW, SLOW, method == "none")
    assert found.pop("answers", (True, True)) == (True, True)
    assert found == GOOD


@pytest.mark.wide
@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_over_devices(sim: Apart, model_of, method, devices):
    asks = devices == 2
    found = sim(loads.on_devices, model_of("llama-gqa"), METHODS[method], devices, FEW, SLOW, asks)
    assert found.pop("answers", (True, True)) == (True, True)
    assert found == GOOD


@pytest.mark.parametrize("method", ["nf4-dq", "int8"])
@pytest.mark.parametrize("mesh", ["ep=2", pytest.param("ep=2,tp=2", marks=pytest.mark.wide)])
def test_experts_over_ranks(sim: Apart, moe_of, mesh, method):
    found = sim(loads.on_ranks, moe_of("mixtral"), method, mesh, 2, FEW, SLOW, True)
    assert found.pop("answers") == {(True, True)}
    assert found == GOOD


@pytest.mark.parametrize(("method", "ranks"), [("int8", "tp=2"), ("nf4-dq", "tp=4 on two nodes"), ("none", "dp=2")])
def test_some_methods_over_ranks(sim: Apart, model_of, method, ranks):
    found = sim(loads.on_ranks, model_of("llama-gqa"), METHODS[method], ranks.split()[0], RANKS[ranks], FEW, SLOW, True)
    assert found.pop("answers") == {(True, True)}
    assert found == GOOD


@pytest.mark.wide
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("method", METHODS)
def test_all_methods_over_ranks(sim: Apart, model_of, method, ranks):
    asks, mesh = ranks == "tp=2", ranks.split()[0]
    found = sim(loads.on_ranks, model_of("llama-gqa"), METHODS[method], mesh, RANKS[ranks], FEW, SLOW, asks)
    assert found.pop("answers", {(True, True)}) == {(True, True)}
    assert found == GOOD
