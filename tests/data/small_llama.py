"""The model of the golden checkpoints that several scripts here write: a seeded llama of one layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(dtype: torch.dtype = torch.bfloat16, **differs: Any) -> LlamaForCausalLM:
    """Random weights; `differs` are fields of its `LlamaConfig`."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**fields | differs)).to(dtype).eval()


def only_needed(folder: Path) -> None:
    """Takes away what the libraries write beside configuration and weights."""
    for extra in ("generation_config.json", "README.md"):
        (folder / extra).unlink(missing_ok=True)
