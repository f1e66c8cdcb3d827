"""Writes tests/data/torchao: small llamas that transformers quantized with torchao and saved, on the CPU.

    python tests/data/make_torchao.py

Written by transformers 5.23.0 and torchao 0.18.0; nothing of distquant is used.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

KINDS = {
    "int8-row": Int8WeightOnlyConfig(),
    "int8-tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
    "fp8-row": Float8WeightOnlyConfig(),
    "fp8-tensor": Float8WeightOnlyConfig(granularity=PerTensor()),
    "int4-group": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
}


def small_llama(hidden: int = 64, inner: int = 96) -> LlamaForCausalLM:
    """A seeded llama of one layer in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def main() -> None:
    root = Path(__file__).parent / "torchao"
    with tempfile.TemporaryDirectory() as plain:
        small_llama().save_pretrained(plain)
        for name, kind in KINDS.items():
            config = TorchAoConfig(quant_type=kind)
            model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
            model.save_pretrained(root / name)
            for extra in ("generation_config.json", "README.md"):
                (root / name / extra).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
