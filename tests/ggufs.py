"""Small GGUF files, written by the package gguf from a family's checkpoint (`models.FAMILIES`).

Types that gguf can quantize are quantized by it; for K-types, which it only reads, blocks of random bytes with small
scales stand in: any bytes are valid ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file

from distquant.checkpoint.gguf import BLOCKS

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a parameter."""
    path, _, leaf = name.rpartition(".")
    if path.startswith("model.layers."):
        _, _, layer, rest = path.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{leaf}"
    return f"{NAMES[path]}.{leaf}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp's conversion of a llama stores them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def blocks(weight: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A weight in blocks of a type, as bytes (plain types as they are)."""
    if not kind.endswith("_K"):
        return quants.quantize(weight, GGMLQuantizationType[kind])
    block, nbytes = BLOCKS[kind]
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 256, (weight.shape[0], weight.shape[1] // block, nbytes), dtype=np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):
        scale = generator.uniform(1e-4, 4e-4, (*words.shape[:2], 1)).astype(np.float16)
        words[..., at : at + 2] = scale.view(np.uint8).reshape(*words.shape[:2], 2)
    return words.reshape(weight.shape[0], -1)


def write_gguf(source: Path, target: Path, kinds: dict[str, str] | str, architecture: str = "llama") -> Path:
    """Writes a checkpoint as a GGUF file.

    Args:
        source: folder of the checkpoint, a llama or qwen2.
        target: the file.
        kinds: type of all 2-D weights, or part of a GGUF name -> type; what matches nothing is F32.
        architecture: `general.architecture`.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    writer = GGUFWriter(target, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    for number, (name, tensor) in enumerate(load_file(source / "model.safetensors").items()):
        stored, weight = gguf_name(name), tensor.to(torch.float32).numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            weight = interleaved(weight, heads)
        kind = kinds if isinstance(kinds, str) else next((k for part, k in kinds.items() if part in stored), "F32")
        kind = kind if weight.ndim == 2 else "F32"
        raw = GGMLQuantizationType[kind]
        writer.add_tensor(stored, blocks(weight, kind, number), raw_dtype=None if kind in ("F32", "F16") else raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
