"""Writes tests/data/torchao: small llamas that transformers quantized with torchao and saved, on the CPU.

    python tests/data/make_torchao.py

Written by transformers 5.23.0 and torchao 0.18.0; nothing of distquant is used.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from small_llama import only_needed, small_llama
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
)
from transformers import AutoModelForCausalLM, TorchAoConfig

KINDS = {
    "int8-row": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "fp8-row": Float8WeightOnlyConfig(),
    "fp8-tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "int4-group": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


def main() -> None:
    root = Path(__file__).parent / "torchao"
    with tempfile.TemporaryDirectory() as plain:
        small_llama(initializer_range=0.1).save_pretrained(plain)
        for name, kind in KINDS.items():
            config = TorchAoConfig(quant_type=kind)
            model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
            model.save_pretrained(root / name)
            only_needed(root / name)


if __name__ == "__main__":
    main()
