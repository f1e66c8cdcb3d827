"""Small models with random weights, one family for each shape that sharding must get right, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SMALL = {
    "vocab_size": 120,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {"intermediate_size": 192}),
    "qwen2-biases": ("qwen2", {}),
    "llama-tied": ("llama", {"hidden_size": 64, "vocab_size": 130, "tie_word_embeddings": True}),
    "phi3-packed": ("phi3", {}),
    "llama-352": ("llama", {"intermediate_size": 352}),
    "llama-96": (
        "llama",
        {"hidden_size": 96, "intermediate_size": 352, "num_attention_heads": 6, "num_key_value_heads": 3},
    ),
    "neox-per-head": ("gpt_neox", {"num_key_value_heads": None}),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", {}),
    "qwen3-head-norms": ("qwen3", {"head_dim": 32}),
}
"""Family -> (model type, what differs from `SMALL`)."""

_GPT = {"num_key_value_heads": None, "rotary_dim": 16, "n_inner": None}
LATER: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", _GPT),
    "codegen": ("codegen", {**_GPT, "num_attention_heads": 8}),
    "exaone": ("exaone", {}),
    "sarvam-moe": (
        "sarvam_moe",
        {"head_dim": 32, "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2},
    ),
    "gpt-oss": ("gpt_oss", {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bamba": ("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16}),
    "falcon-h1": ("falcon_h1", {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
}
"""Families whose tensor-parallel plan, or rule for the embedding, came with transformers 5.24, as `FAMILIES`."""


def save_model(family: str, folder: Path, seed: int = 0) -> Path:
    """Writes a bf16 checkpoint of a family into `folder`, with values at which every parameter matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differs = {**FAMILIES, **LATER}[family]
    fields = {
        name: value for name, value in {**SMALL, **differs}.items() if value is not None or name == "eos_token_id"
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise if "embed" in name else noise / parameter.shape[1] ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_as_stored(model: Any, folder: Path) -> None:
    """Writes what a model stores though its own `save_pretrained` refuses, as earlier versions did."""
    kept, model.hf_quantizer = model.hf_quantizer, None
    type(model).save_pretrained(model, folder)
    model.hf_quantizer = kept
