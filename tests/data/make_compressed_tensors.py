"""Writes the checkpoints in `compressed_tensors/`, quantized and compressed by the library of that name (0.20).

    python tests/data/make_compressed_tensors.py

Each holds the small llama of `unquantized/`, with random weights. Scales are the library's `calculate_qparams` of the
range of each group; `ModelCompressor` quantizes, packs and describes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from small_llama import only_needed, small_llama
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent / "compressed_tensors"


def weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, **more}


def group(weights: dict[str, Any], targets: tuple[str, ...] = ("Linear",), **more: Any) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, **more}


TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
KINDS: dict[str, list[dict[str, Any]]] = {
    "int4": [group(weights(4, "int", "group", group_size=32))],
    "int4-zeros": [group(weights(4, "int", "group", group_size=32, symmetric=False))],
    "int8-w8a8": [group(weights(8, "int", "channel"), input_activations=TOKEN | {"type": "int"})],
    "int8-naive": [group(weights(8, "int", "tensor", symmetric=False), format="naive-quantized")],
    "fp8-static": [
        group(weights(8, "float", "tensor"), input_activations=weights(8, "float", "tensor", dynamic=False))
    ],
    "fp8-block": [group(weights(8, "float", "block", block_structure=[64, 64]), format="float-quantized")],
    "mixed": [
        group(weights(8, "float", "channel"), input_activations=TOKEN | {"type": "float"}),
        group(weights(3, "int", "group", group_size=32), ("re:.*q_proj", "re:.*o_proj")),
        group(weights(8, "int", "channel"), ("model.layers.0.self_attn.k_proj",), format="pack-quantized"),
        group(weights(4, "int", "channel"), ("re:.*(gate|up)_proj$",)),
    ],
}


def model() -> LlamaForCausalLM:
    return small_llama(vocab_size=64, initializer_range=0.2, bos_token_id=1, eos_token_id=None)


def observe(module: torch.nn.Module, args: Any) -> None:
    """Fills a module's scales and zero points."""
    weight, size = module.weight.data, args.group_size
    if args.strategy == "tensor":
        low, high = weight.amin().view(1), weight.amax().view(1)
    elif args.strategy == "channel":
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    elif args.strategy == "group":
        low, high = (getattr(weight.unflatten(1, (-1, size)), kind)(-1) for kind in ("amin", "amax"))
    else:
        rows, columns = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, args.block_structure)
        tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    scale, zero = calculate_qparams(low, high, args)
    module.weight_scale.data.copy_(scale)
    module.weight_zero_point.data.copy_(zero)


def write(kind: str, folder: Path) -> None:
    found = model()
    groups = {f"group_{i}": one for i, one in enumerate(KINDS[kind])}
    apply_quantization_config(found, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for name, module in found.named_modules():
        if hasattr(module, "quantization_scheme"):
            observe(module, module.quantization_scheme.weights)
            module.quantization_status = QuantizationStatus.FROZEN
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.01 * (1 + len(name) % 5))
    compressor = ModelCompressor.from_pretrained_model(found)
    compressor.compress_model(found)
    found.save_pretrained(folder)
    compressor.update_config(str(folder))
    only_needed(folder)


if __name__ == "__main__":
    os.umask(0o022)
    model().save_pretrained(HERE / "unquantized")
    only_needed(HERE / "unquantized")
    for kind in KINDS:
        write(kind, HERE / kind)
