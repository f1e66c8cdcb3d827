"""What ranks do in tests of compressed-tensors, and what transformers makes of the same files."""

from __future__ import annotations

from typing import Any

import lora
import torch
from torch import Tensor
from work import IDS

import distquant as dq


def config(file_format: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": file_format}
    return {"quant_method": "compressed-tensors", "format": file_format, "config_groups": {"group_0": group}, **more}


def group(weights: dict[str, Any], file_format: str, *targets: str) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, "format": file_format}


INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
INT8 = {"type": "int", "num_bits": 8}
FP8 = {"type": "float", "num_bits": 8}
BLOCKS = config("float-quantized", {**FP8, "strategy": "block", "block_structure": [128, 128]})
WAYS: dict[str, Any] = {
    "int4": config("pack-quantized", INT4),
    "int4-zeros": config("pack-quantized", {**INT4, "group_size": 16, "symmetric": False}),
    "int8-rows": config("int-quantized", {**INT8, "strategy": "channel"}),
    "int8-tensor": config("int-quantized", {**INT8, "strategy": "tensor"}),
    "fp8-row": "fp8-row",
    "fp8-tensor": config("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8-blocks": config("float-quantized", {**FP8, "strategy": "block", "block_structure": [32, 32]}),
    "mixed": {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "attention": group({**INT8, "strategy": "channel"}, "pack-quantized", "re:.*self_attn"),
            "down": group({**FP8, "strategy": "tensor"}, "naive-quantized", "model.layers.0.mlp.down_proj"),
            "rest": group(INT4, "pack-quantized", "Linear"),
        },
        "ignore": ["re:.*layers[.]1[.]self_attn[.]o_proj", "lm_head"],
    },
}
"""Configurations for quantizing on the way."""


def loaded(path: str, quant: Any, mesh: str | None = None, **kwargs: Any) -> tuple[str, int, int]:
    """Fingerprint, bytes of quantized modules as the plan says, and as they are."""
    model = dq.load(path, quantization_config=quant, mesh=mesh, **kwargs)
    tp = model.distquant.comm.axis("tp").rank
    held = 0
    for name in model.distquant.plan.converted:
        buffers = model.get_submodule(name)._buffers.values()
        held += sum(value.nbytes for value in buffers if value is not None)
    return dq.fingerprint(model), model.distquant.plan.memory[tp].quantized, held


def logits(path: str, quant: Any, mesh: str | None = None) -> Tensor:
    model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32")
    with torch.no_grad():
        return model(torch.tensor(IDS) % model.config.vocab_size).logits


def train(path: str, quant: Any, mesh: str | None = None) -> Any:
    model = lora.wrap(dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32"))
    lora.fill(model)
    return lora.step(model)


def state(path: str, quant: Any, mesh: str | None = None) -> dict[str, Tensor]:
    return dq.load(path, quantization_config=quant, mesh=mesh).state_dict()


def dequantized(path: str, dtype: str = "bfloat16") -> dict[str, Tensor]:
    model = dq.load(path, dtype=dtype)
    return {name: model.get_submodule(name).weight for name in model.distquant.plan.converted}


def theirs(path: str, dtype: torch.dtype, dequantize: bool = False) -> Any:
    """The model as transformers loads it with compressed-tensors, decompressed, activations left alone as ours."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # Packed zero points do not fit the parameters that compressed-tensors 0.20 makes on meta; this way needs none.
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more)
    for module in model.modules():
        if hasattr(module, "quantization_status"):
            module.quantization_enabled = False
    with torch.no_grad():
        model(torch.tensor(IDS) % model.config.vocab_size)  # the first forward decompresses
    return model
