"""Weights come whole to several devices, copies never outlive their memory, and no thread waits behind a collective."""

from __future__ import annotations

import on_sim
import pytest
from apart import Apart


@pytest.mark.parametrize(("quant", "staging"), [("none", "128KiB"), ("none", "64MiB"), ("nf4-dq", "128KiB")])
def test_two_devices_of_one_process_get_the_bits_of_the_cpu(sim: Apart, model_of, quant, staging):
    found = sim(on_sim.over_two_devices, model_of("llama-gqa"), quant, staging)
    assert found["devices"] == ["sim:0", "sim:1"]
    assert found["differing"] == []
    assert found["equal"]
    assert found["copies"] > 10  # pinned and asynchronous: what a GPU's would be
    assert found["faults"] == []
    assert found["still pinned"] == 0


@pytest.mark.parametrize("seconds", [1e-5, 1e-3])
def test_listening_threads_do_not_wait_behind_collectives(sim: Apart, model_of, seconds):
    """Ranks with few slots wait for those of their node, and those for a collective that wants everyone."""
    found = sim(on_sim.over_two_nodes, model_of("llama-gqa"), "nf4-dq", "64KiB", seconds)
    assert found == {"equal": True, "faults": [], "still pinned": 0}


def test_memory_outlives_the_copies_of_a_load_that_is_interrupted(sim: Apart, model_of):
    found = sim(on_sim.interrupted, model_of("llama-gqa"), "128KiB")
    assert found.pop("copies") > 0
    assert found == {"raised": "KeyboardInterrupt", "faults": [], "still pinned": 0}


def test_a_device_that_stands_still_is_named_and_its_memory_is_kept(sim: Apart, model_of):
    found = sim(on_sim.device_that_stands_still, model_of("llama-gqa"))
    assert found["raised"] == "rank 0 failed: a copy to sim:1 was not done within 0.5 s"
    assert len(found["warnings"]) == 1
    assert "rank 0: a read or copy still goes on 0.5 s after the load ended" in found["warnings"][0]
    assert found["kept"] == 1
    assert found["faults"] == []
