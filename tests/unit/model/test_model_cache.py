"""The cache of every kind of layer has the bytes that transformers' own cache has after a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distquant.model import describe_decoder

SMALL = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "head_dim": 16,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "window": ("mistral", {"sliding_window": 8}),
    "every-second-window": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "windows-and-one-full": ("gemma3_text", {"head_dim": 16, "sliding_window": 8}),
    "chunks": ("llama4_text", {"head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2,
                               "intermediate_size_mlp": 96}),
    "latent": ("deepseek_v3", {**LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                               "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
    "multi-query": ("gpt_bigcode", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 128, "num_key_value_heads": None}),
    "linear-attention": ("qwen3_next", {**DELTA, "num_experts": 4, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    "convolution": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"]}),
}  # fmt: skip


@pytest.mark.parametrize("context", [5, 30])
@pytest.mark.parametrize("case", MODELS)
def test_cache_is_that_of_a_forward(case: str, context: int) -> None:
    model_type, differs = MODELS[case]
    config = AutoConfig.for_model(model_type, **{**SMALL, **differs})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.device("meta"):
        decoder = describe_decoder(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    assert decoder is not None
    assert decoder.unknown == ()
    with torch.no_grad():
        cache = model(torch.arange(3, 3 + context)[None], use_cache=True).past_key_values
    held = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            values = value.values() if isinstance(value, dict) else [value]
            held += sum(each.nbytes for each in values if isinstance(each, torch.Tensor) and each.dim())
    planned = 0
    for each in decoder.layers:
        tokens = context if each.window is None else min(context, each.window - 1)
        planned += 2 * tokens * (each.heads * each.head_width + each.shared_width)
        planned += 2 * each.state + 4 * each.float_state
    assert planned == held
