"""Checkpoints as methods store them that have no scheme here: the tensors of a saved model, rewritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, method: dict[str, Any], names: str, how: Any) -> Path:
    """Replaces each weight whose name contains `names` by what `how(name, weight)` makes of it, and names a method."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors |= how(name, tensor) if names in name and name.endswith(".weight") else {name: tensor}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return folder


def fp8_like(folder: Path) -> Path:
    """As DeepSeek-V3, under a method's name that nobody knows: float8 weights, float32 scales of 128 x 128 blocks."""

    def store(name: str, weight: torch.Tensor) -> Tensors:
        blocks = [-(-size // 128) for size in weight.shape]
        return {name: weight.to(torch.float8_e4m3fn), name + "_scale_inv": torch.ones(blocks)}

    method = {"quant_method": "eights", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return rewrite(folder, method, "_proj.", store)


def gptq_like(folder: Path) -> Path:
    """As GPTQ: eight 4-bit codes in an int32, under names of their own."""

    def store(name: str, weight: torch.Tensor) -> Tensors:
        (out, into), module = weight.shape, name.removesuffix("weight")
        return {
            module + "qweight": torch.zeros(into // 8, out, dtype=torch.int32),
            module + "qzeros": torch.zeros(into // 64, out // 8, dtype=torch.int32),
            module + "scales": torch.zeros(into // 64, out, dtype=torch.float16),
        }

    return rewrite(folder, {"quant_method": "words", "bits": 4, "group_size": 64}, "mlp.", store)


def packed(folder: Path) -> Path:
    """Two 4-bit codes in a byte, under the weight's own name."""

    def store(name: str, weight: torch.Tensor) -> Tensors:
        return {name: torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)}

    return rewrite(folder, {"quant_method": "nibbles"}, "mlp.", store)


def unquantized(folder: Path) -> Path:
    """Names a method, and stores every weight as it was."""
    return rewrite(folder, {"quant_method": "nothing"}, "mlp.", lambda name, weight: {name: weight})
