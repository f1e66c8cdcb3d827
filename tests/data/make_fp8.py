"""Writes the golden checkpoints of `fp8`, `mxfp8` and `fbgemm_fp8`: small models, quantized by transformers' own code.

    python tests/data/make_fp8.py

`Fp8Quantize` of transformers runs on a CPU, though `from_pretrained` refuses to quantize there; ragged tiles, which it
leaves alone, are made from a weight with zeros around it. `quantize_fp8_per_row` of FBGEMM runs on GPUs only, so its
rows are written by its definition (`fbgemm_gpu/experimental/gen_ai/src/quantize/quantize.cu`), with numpy's division.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, FbgemmFp8Config, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

HERE = Path(__file__).parent
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
}
SHARED = {
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
DEEPSEEK_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [32, 32],
}
"""The keys of DeepSeek-V3's file, with a tile that fits the model."""


class Quantizer:
    """What `Fp8Quantize` asks of transformers' quantizer."""

    def __init__(self, **fields: Any):
        self.quantization_config = FineGrainedFP8Config(**fields)


def tiles(weight: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Codes and scales of transformers."""
    block = quantizer.quantization_config.weight_block_size or weight.shape
    missing = [-size % part for size, part in zip(weight.shape, block, strict=True)]
    padded = torch.nn.functional.pad(weight, (0, missing[1], 0, missing[0]))
    found = Fp8Quantize(quantizer).convert({"m.weight": padded})
    codes = found["m.weight"][: weight.shape[0], : weight.shape[1]]
    return codes.contiguous(), found["m.weight_scale_inv"]


def rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of FBGEMM."""
    values = weight.float().numpy()
    amax = abs(values).max(1, keepdims=True)
    scale = (amax / values.dtype.type(448)).clip(min=values.dtype.type(1) / values.dtype.type(448 * 512))
    return torch.from_numpy(values / scale).to(torch.float8_e4m3fn), torch.from_numpy(scale)


def model_of(model_type: str, fields: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **SHARED, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[1] ** 0.5)
    return model.to(torch.bfloat16)


def write(folder: str, model: Any, quantization: dict[str, Any], how: Any) -> None:
    """Saves a model whose linear weights, but for the head, became what `how(weight)` says."""
    target, tensors = HERE / folder, dict(model.state_dict())
    tensors.pop("lm_head.weight")  # tied
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            tensors |= {f"{name}.{part}": value for part, value in how(tensors.pop(f"{name}.weight")).items()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": "bfloat16"}
    config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def in_tiles(folder: str, model: Any, written: dict[str, Any] | None = None, **fields: Any) -> None:
    quantizer = Quantizer(**fields)

    def how(weight: Tensor) -> dict[str, Tensor]:
        codes, scale = tiles(weight, quantizer)
        return {"weight": codes, "weight_scale_inv": scale}

    write(folder, model, written or quantizer.quantization_config.to_dict(), how)


def main() -> None:
    in_tiles("fp8/blocks", model_of("llama", LLAMA, 0), weight_block_size=(32, 32))
    in_tiles("fp8/ue8m0", model_of("llama", LLAMA, 1), weight_block_size=(32, 32), scale_fmt="ue8m0")
    in_tiles("fp8/deepseek-v3", model_of("deepseek_v3", DEEPSEEK, 2), DEEPSEEK_CONFIG, weight_block_size=(32, 32))

    whole = Quantizer(weight_block_size=None, activation_scheme="static")

    def one_scale(weight: Tensor) -> dict[str, Tensor]:
        codes, scale = tiles(weight, whole)
        return {"weight": codes, "weight_scale_inv": scale.view(()), "activation_scale": weight.float().std() / 448}

    write("fp8/tensor", model_of("llama", LLAMA, 3), whole.quantization_config.to_dict(), one_scale)

    mx = Quantizer(weight_block_size=(1, 32), scale_fmt="ue8m0")

    def as_bytes(weight: Tensor) -> dict[str, Tensor]:
        codes, scale = tiles(weight, mx)
        return {"weight": codes, "weight_scale_inv": scale.view(torch.uint8)}

    config = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "activation_scheme": "dynamic"}
    write("mxfp8", model_of("llama", LLAMA, 4), config, as_bytes)

    def by_rows(weight: Tensor) -> dict[str, Tensor]:
        return dict(zip(("weight", "weight_scale"), rows(weight), strict=True))

    write("fbgemm_fp8", model_of("llama", LLAMA, 5), FbgemmFp8Config().to_dict(), by_rows)


if __name__ == "__main__":
    main()
