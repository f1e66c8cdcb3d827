"""Refusals of the native kernels: invalid arguments, and instruction sets that this machine lacks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from distquant.errors import InputError

cpu = pytest.importorskip("distquant.kernels.cpu", reason="the native kernels were not built")
from distquant.kernels.cpu import library  # noqa: E402

WEIGHT = torch.ones(4, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.quantize_4bit(torch.ones(33), 64, "nf4"), "33 codes do not fill whole bytes"),
        (lambda: cpu.quantize_4bit(WEIGHT, 16, "nf4"), "blocksize is 16"),
        (lambda: cpu.quantize_4bit(WEIGHT, 33, "nf4"), "blocksize is 33"),
        (lambda: cpu.quantize_4bit(WEIGHT, 64, "nf5"), "unknown quant_type 'nf5'"),
        (lambda: cpu.quantize_4bit(WEIGHT.double(), 64, "nf4"), "the weight is torch.float64"),
        (lambda: cpu.quantize_4bit(WEIGHT.to("meta"), 64, "nf4"), "the weight is on meta"),
        (lambda: cpu.quantize_4bit(WEIGHT, 64, "nf4", absmax=torch.ones(3)), "the output is torch.float32"),
        (lambda: cpu.quantize_4bit(WEIGHT, 64, "nf4", absmax=torch.ones(8)[::2]), "not contiguous"),
        (lambda: cpu.dequantize_4bit(torch.zeros(3).byte(), torch.ones(1), 64, "nf4", (8,)), "codes has 3 elements"),
        (lambda: cpu.dequantize_4bit(torch.zeros(4), torch.ones(1), 64, "nf4", (8,)), "codes is torch.float32"),
        (
            lambda: cpu.dequantize_4bit(torch.zeros(4).byte(), torch.ones(1), 64, "nf4", (8,), torch.int8),
            "dtype is torch.int8",
        ),
        (lambda: cpu.quantize_blockwise(torch.ones(8), torch.ones(16), 256), "code has 16 values"),
        (lambda: cpu.quantize_int8_rows(torch.ones(8)), "not that of a matrix"),
        (lambda: cpu.quantize_int8_rows(torch.ones(8, 0)), "without columns"),
        (lambda: cpu.quantize_fp8(WEIGHT, (0, 4)), "rows of a block is 0"),
        (lambda: cpu.quantize_groups(WEIGHT, 32, 3, True), "groups of 3 bits"),
        (lambda: cpu.quantize_groups(WEIGHT, 0, 4, True), "group_size is 0"),
        (lambda: cpu.dequantize_groups(torch.zeros(4, 64).char(), torch.ones(4), None, 32), "scale has 4 elements"),
        (lambda: cpu.quantize_mxfp4(WEIGHT[:, :48]), "rows have 48 columns, not a multiple of 32"),
        (lambda: cpu.dequantize_mxfp4(torch.zeros(4, 24).byte(), torch.ones(8).byte()), "rows have 48 columns"),
        (lambda: cpu.dequantize_mxfp4(torch.zeros(4, 32).byte(), torch.ones(7).byte()), "scale has 7 elements"),
        (lambda: cpu.dequantize_mxfp4(torch.zeros(4, 32), torch.ones(8).byte()), "codes is torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def forced(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from distquant.kernels import cpu; print(cpu.isa())"
    environment = {**os.environ, library.VARIABLE: isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)


def test_the_environment_forces_an_instruction_set():
    assert forced("portable").stdout.strip() == "portable"
    refused = forced("avx1024")
    assert refused.returncode == 1
    assert "'avx1024' cannot run here. This machine has portable" in refused.stderr


def test_an_instruction_set_that_is_not_there_is_never_run(monkeypatch):
    monkeypatch.setattr(library, "ISAS", (*library.ISAS, "sve"))
    with library.running("sve"), pytest.raises(InputError, match="'sve' cannot run here"):
        cpu.quantize_int8_rows(WEIGHT)
