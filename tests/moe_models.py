"""Small mixtures of experts with random weights, one family for each form of experts, saved by transformers.

Each is written in two forms: as hubs have it (`hub`: what `save_pretrained` writes, one tensor per expert where the
family converts them back, in several files) and with the model's own 3-D parameters (`fused`). Sizes are chosen so
that cuts meet them: 96 and 352 are no whole number of blocks of 64 or tiles of 128, 8 experts do not divide by 3
ranks, 5 and 11 by none of 2, 3 and 4, and of 11 the number 10 sorts before 2 as text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
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
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2-moe": (  # a shared expert with a gate, and biases in attention
        "qwen2_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 352,
            "shared_expert_intermediate_size": 192,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": (  # hidden size of no whole blocks either
        "olmoe",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "num_experts": 11,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek-v3": (  # a dense layer first, shared experts, routing in groups, latent attention
        "deepseek_v3",
        {
            "hidden_size": 192,
            "intermediate_size": 320,
            "moe_intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
        },
    ),
    "nemotron-h": (  # no gate, experts of a smaller hidden size, layers of one kind each
        "nemotron_h",
        {
            "hidden_size": 96,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "layer_types": ["full_attention", "moe", "mlp", "full_attention", "moe"],
            "num_hidden_layers": 5,
            "n_routed_experts": 7,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 352,
            "moe_shared_expert_intermediate_size": 96,
            "moe_latent_size": 64,
        },
    ),
    "gpt-oss": (  # `[expert, in, out]`, gate and up interleaved, biases
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "llama4": (  # `[expert, in, out]`, gate and up concatenated, every expert called with every token
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 3,
            "moe_layers": [1, 2],
        },
    ),
}
"""Family -> (model type, what differs from `SMALL`)."""

FORMS = ("hub", "fused")
TURNED = ("gpt-oss", "llama4")
"""Families that hold `[expert, in, out]`; their hub form is the fused one."""


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A family's model in bfloat16, with values at which every parameter matters; `changes` go to its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differs = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**SMALL, **differs, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    values = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n in model.state_dict())]
    with torch.no_grad():
        for name, value in values:
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() > 1 and not name.endswith("bias"):
                inputs = value.shape[1] if value.dim() == 2 or family in TURNED else value.shape[2]
                value.copy_(noise if "embed" in name else noise / inputs**0.5)
            elif "norm" in name and name.endswith("weight"):
                value.add_(noise * 0.2)
            else:
                value.copy_(noise * 0.3)
    return model.to(torch.bfloat16)


def save_moe(family: str, folder: Path, form: str = "hub", seed: int = 0) -> Path:
    """Writes a family's checkpoint into `folder`."""
    model = make_model(family, seed)
    model.save_pretrained(folder, max_shard_size="300KB")
    if form == "fused":
        for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
            file.unlink()
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def changed(source: str, target: Path, change: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> str:
    """A copy of a checkpoint in one file, with what `change` does to its tensors, and other fields in its config."""
    tensors = read_all(Path(source))
    change(tensors)
    target.mkdir()
    fields = json.loads((Path(source) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(fields | config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)
