"""Bounds on the copies of a load over several devices: none that the host waits for, none for a piece of a peer."""

from __future__ import annotations

import on_sim_node
import pytest
from apart import Apart

RANKS = 4


@pytest.mark.parametrize("quant", ["nf4-dq", "none", "fp8-tensor"])
def test_what_ranks_send_each_other_goes_to_a_device_once_a_tensor(sim: Apart, model_of, quant):
    found = sim(on_sim_node.on_one_node, model_of("llama-gqa"), quant, RANKS, "128KiB", 1e-5)
    assert found["equal"]
    assert found["faults"] == []
    assert found["readers"] == {4}  # quantizing needs no core
    assert found["still pinned"] == 0
    counts = {what: times for what, (times, _) in found["counts"].items()}
    # Constants of the method and buffers that are computed, not pieces: a few for each device.
    waited = sum(times for what, times in counts.items() if what.startswith(("H2D", "D2H")) and "sync" in what.split())
    assert waited <= 8 * RANKS
    # Every piece that was read goes to one device; then at most two components of each tensor go to every device.
    assert counts["H2D pinned async"] <= found["pieces"] + 2 * RANKS * found["tensors"]
    assert counts.get("D2H pinned async", 0) <= 2 * found["pieces"]
    assert counts.get("stream.synchronize", 0) == counts.get("event.synchronize", 0) == 0
