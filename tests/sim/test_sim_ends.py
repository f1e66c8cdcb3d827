"""No order of a device's work spoils or blocks a load; one that ends early leaves nothing; slow paths are counted."""

from __future__ import annotations

import ends
import pytest
from apart import Apart


def test_few_loads_in_disorder(sim: Apart, model_of):
    assert sim(ends.in_disorder, model_of("llama-gqa"), "nf4-dq", "128KiB", range(3)) == []


@pytest.mark.wide
@pytest.mark.parametrize("first", range(0, 100, 10))
def test_hundred_loads_in_disorder(sim: Apart, model_of, first):
    assert sim(ends.in_disorder, model_of("llama-gqa"), "nf4-dq", "128KiB", range(first, first + 10)) == []


def test_few_loads_that_end_early_leave_nothing(sim: Apart, model_of):
    assert sim(ends.ended_at_random, model_of("llama-gqa"), "nf4-dq", "128KiB", range(3)) == []


@pytest.mark.wide
@pytest.mark.parametrize("first", range(3, 33, 10))
def test_loads_that_end_early_leave_nothing(sim: Apart, model_of, first):
    assert sim(ends.ended_at_random, model_of("llama-gqa"), "nf4-dq", "128KiB", range(first, first + 10)) == []


def test_memory_that_cannot_be_pinned_is_used_as_it_is(sim: Apart, model_of):
    found = sim(ends.without_pinning, model_of("llama-gqa"), "nf4-dq", "128KiB")
    assert found == {"equal": True, "pinned": 0, "faults": []}


KNOWN = {"nf4-dq": {"H2D pageable": 2, "D2H pageable": 2}, "hqq": {"H2D pageable": 3, "item()": 21}}
"""For each converted weight: nested absmax has its mean on the host, and each of HQQ's 20 steps may be the last."""

ONCE = 6
"""Copies that are made once: of computed buffers (`inv_freq`), and of a method's tables of codes."""


@pytest.mark.parametrize(
    "method",
    ["none", "nf4", "nf4-dq", "int8", "fp8", "fp8-row", "fp8-tensor", "mxfp4", "quanto-int8", "gptq-rtn-g32", "hqq"],
)
def test_host_waits_for_no_piece(sim: Apart, model_of, method):
    """A piece is one asynchronous copy from pinned memory. Nothing else is copied or waited for but once a weight."""
    found = sim(ends.counted, model_of("llama-gqa"), method, "128KiB")
    assert found["pieces"] > 20
    assert found.pop("H2D pinned async") <= found["pieces"]
    weights, known = found["converted"], KNOWN.get(method, {})

    def counted(kind: str) -> int:
        return sum(times for what, times in found.items() if what.startswith(kind))

    assert counted("H2D pageable") <= ONCE + known.get("H2D pageable", 0) * weights
    assert counted("D2H pageable") <= known.get("D2H pageable", 0) * weights
    waits = (
        "H2D pinned sync",
        "D2H pinned sync",
        "stream.synchronize",
        "event.synchronize",
        "device.synchronize",
        "item()",
    )
    assert {what: counted(what) for what in waits if counted(what) > known.get(what, 0) * weights} == {}
