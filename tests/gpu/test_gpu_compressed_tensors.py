"""compressed-tensors on a GPU: the CPU's bits, and its weights; skipped, visibly, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distquant as dq
from distquant.loading.loader import load_shard
from distquant.parallel.comm import SoloComm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DATA = Path(__file__).parents[1] / "data" / "compressed_tensors"
BLOCK = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [64, 64]}
TENSOR = {"type": "int", "num_bits": 8, "strategy": "tensor", "symmetric": False}
ZEROS = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}


def config(file_format: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": file_format}
    return {"quant_method": "compressed-tensors", "format": file_format, "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("folder", "quant"),
    [
        ("int4-zeros", None),
        ("mixed", None),
        ("fp8-block", None),
        ("unquantized", "fp8-row"),
        ("unquantized", config("float-quantized", BLOCK)),
        ("unquantized", config("naive-quantized", TENSOR)),
        ("unquantized", config("pack-quantized", ZEROS)),
    ],
)
def test_bits_and_weights_on_the_gpu_are_those_on_the_cpu(folder: str, quant: Any) -> None:
    plan = dq.plan(str(DATA / folder), quantization_config=quant)
    on_gpu, on_cpu = load_shard(plan, SoloComm(), "cuda:0"), load_shard(plan, SoloComm(), "cpu")
    assert dq.fingerprint(on_gpu) == dq.fingerprint(on_cpu)
    for name in plan.converted:
        assert torch.equal(on_gpu.get_submodule(name).weight.cpu(), on_cpu.get_submodule(name).weight), name
