"""What the package asks a GPU for; skipped, visibly, where there is none."""

from __future__ import annotations

import mmap

import pytest
import torch

import distquant as dq
from distquant.accelerator import facts, host_memory
from distquant.kernels.compiler_trial import triton_problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_a_failed_registration_leaves_no_error_behind() -> None:
    device = facts.own_device()
    memory = torch.frombuffer(mmap.mmap(-1, 1 << 20), dtype=torch.uint8)
    first = host_memory.HostRegistration(memory, device)
    assert first.pinned, first.failure
    again = host_memory.HostRegistration(memory, device)  # CUDA's error 712: registered already
    assert not again.pinned
    assert "712" in again.failure
    assert float(torch.ones(4, device=device).sum()) == 4  # a launch, which would raise what was left behind
    again.release()
    first.release()
    first.release()
    assert float(torch.ones(4, device=device).sum()) == 4


def test_host_memory_can_be_pinned_and_triton_compiles() -> None:
    device = facts.own_device()
    assert host_memory.trial(device) == ""
    assert triton_problem(device) is None


def test_facts() -> None:
    device = facts.own_device()
    assert device.index is not None
    assert facts.resolved("cuda") == device
    assert facts.device_label(device) == torch.cuda.get_device_name(device)
    assert facts.group_backend() == "cpu:gloo,cuda:nccl"
    before = facts.random_state(device)
    torch.rand(3, device=device)
    facts.set_random_state(before, device)
    assert torch.equal(facts.random_state(device), before)
    free = facts.free_memory(device)
    assert free is not None and free > 0


def test_the_report_of_a_load(kjv_tiny: str) -> None:
    report = dq.load(kjv_tiny, quantization_config="none").distquant.report
    assert report.load_buffer == "pinned"
    (one,) = report.devices
    assert one["device"] == str(facts.own_device())
    assert report.quantized_bytes + report.unquantized_bytes <= one["peak_bytes"] == report.peak_device_bytes
