"""Facts about devices, host memory that cannot be pinned, and the checks and the end of a load on them."""

from __future__ import annotations

import on_sim_accelerator
from apart import Apart

FULL = "{} did not register host memory (error 2)"


def test_a_load_goes_on_where_memory_cannot_be_pinned_and_says_so(sim: Apart, model_of):
    found = sim(on_sim_accelerator.not_pinned, model_of("llama-gqa"))
    assert found["differing"] == []
    assert found["error left behind"] == (0, 0)  # the next kernel would raise it
    assert found["unregistered"] == 0
    reason = f"not pinned: {FULL.format('sim:1')}"  # whose weight is the first
    assert found["load_buffer"] == reason
    assert found["notes"] == [
        f"the load buffer of rank 0 is {reason}. The load is right, but each copy to the device was waited for"
    ]
    assert found["doctor"] == [
        "device: sim sim:0",
        f"host memory: not pinned: {FULL.format('sim:0')}; loads are right, but wait for each copy to the device",
    ]
    assert found["faults"] == []


def test_registration_is_tried_and_given_back(sim: Apart):
    assert sim(on_sim_accelerator.trial_of_registration) == [
        "", FULL.format("sim:0"), "torch registers no host memory with sim devices", "0", "0"
    ]  # fmt: skip


def test_each_device_has_its_own_peak_which_begins_with_the_load(sim: Apart, model_of):
    found = sim(on_sim_accelerator.facts_of_devices, model_of("llama-gqa"))
    assert [one["device"] for one in found["devices"]] == ["sim:0", "sim:1"]
    for one in found["devices"]:
        assert found["held"][one["device"]] <= one["peak_bytes"] < 1 << 26
    assert found["highest"] == max(one["peak_bytes"] for one in found["devices"])
    assert found["load_buffer"] == "pinned"
    assert found["doctor"] == ["device: sim sim:0", "host memory: can be pinned"]
    assert (found["registered"], found["backend"], found["free"], found["capability"]) == (0, "gloo", True, None)


def test_a_device_without_a_number_is_the_current_one(sim: Apart, model_of):
    assert sim(on_sim_accelerator.without_a_number, model_of("llama-gqa")) == {
        "devices": ["sim:1"], "report": ["sim:1"], "local": "sim:1", "numbered": "sim:1"
    }  # fmt: skip


def test_devices_are_done_when_seconds_are_taken(sim: Apart, model_of):
    assert sim(on_sim_accelerator.seconds_end_with_the_devices, model_of("llama-gqa")) == [True, True]


def test_triton_is_tried_before_anything_is_read(sim: Apart, model_of):
    found = sim(on_sim_accelerator.triton_where_it_cannot_run, model_of("llama-gqa"), "nf4")
    ((where, what, fix),) = found["raised"]
    assert where == "kernel"
    assert what.startswith("Triton cannot compile its kernels here: ")
    assert fix.endswith("kernel='reference' quantizes without Triton, slowly")
    assert not found["opened"]


def test_triton_is_not_tried_where_nothing_is_quantized(sim: Apart, model_of):
    assert sim(on_sim_accelerator.triton_where_it_cannot_run, model_of("llama-gqa"), "none") == {
        "raised": [], "opened": True
    }  # fmt: skip


def test_what_raises_at_the_end_keeps_nothing_else_from_ending(sim: Apart, model_of):
    found = sim(on_sim_accelerator.close_that_raises, model_of("llama-gqa"))
    assert found["raised"] == "KeyboardInterrupt"
    assert found["threads"] == []
    assert found["kept"] == 1  # copies may still read from it
