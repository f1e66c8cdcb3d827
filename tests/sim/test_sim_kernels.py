"""Quantization on a device: the CPU's bits, where the weight is."""

from __future__ import annotations

import on_sim_kernels
import pytest
from apart import Apart


@pytest.mark.parametrize(("axis", "optimize"), [(1, True), (0, True), (1, False)])
def test_hqq_quantizes_where_the_weight_is(sim: Apart, axis, optimize):
    found = sim(on_sim_kernels.hqq, (512, 1024), axis, optimize)
    assert found.pop("to host") < 1024  # whether the error falls, after each round; the weight has a mebibyte
    assert found == {"on": {"sim:0"}, "equal": [True] * 3, "faults": []}


def test_tiles_of_a_device_are_the_cpus(sim: Apart):
    assert sim(on_sim_kernels.rows_and_tiles, 520, 1030) == {"equal": [True] * 5, "faults": []}


@pytest.mark.parametrize("quant", ["hqq", "fp8", "fbgemm_fp8", "gptq-rtn-g64"])
def test_a_load_has_the_fingerprint_of_the_cpu(sim: Apart, model_of, quant):
    assert sim(on_sim_kernels.loaded, model_of("llama-gqa"), quant) == {"equal": True, "faults": []}
