"""Writes a checkpoint of a large model's shape: its config and true safetensors headers, with no data behind them.

    python benchmarks/shapes.py deepseek-v3|deepseek-v3-bf16|gpt-oss-120b|llama-70b FOLDER

The files are sparse: as long as the real ones, and empty on the disk. `distquant plan` reads nothing else, so that its
tables are those of the real checkpoint; loading one gives a model of zeros.

Shapes and configs are those of deepseek-ai/DeepSeek-V3 (without the layer for multi-token prediction, which
transformers drops), as it is stored and in bfloat16, openai/gpt-oss-120b, and meta-llama/Llama-3.1-70B (without its
scaling of rotary embeddings) on the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Tensor = tuple[str, str, list[int]]
"""Name, safetensors' dtype, shape."""

NBYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1}
FILE = 5_000_000_000
"""Bytes after which a new file starts."""
TILE = 128


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[Tensor]:
    yield f"{name}.weight", "BF16", [rows, columns]
    if bias:
        yield f"{name}.bias", "BF16", [rows]


def tiles(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """Yields a weight in fine-grained FP8."""
    yield f"{name}.weight", "F8_E4M3", [rows, columns]
    yield f"{name}.weight_scale_inv", "F32", [-(-rows // TILE), -(-columns // TILE)]


DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [TILE, TILE],
    },
}


def deepseek(config: dict[str, Any]) -> Iterator[Tensor]:
    weight = tiles if "quantization_config" in config else linear
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    yield from linear("model.embed_tokens", vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield from weight(f"{name}.self_attn.q_a_proj", query, hidden)
        yield from weight(f"{name}.self_attn.q_b_proj", heads * (nope + rope), query)
        yield from weight(f"{name}.self_attn.kv_a_proj_with_mqa", latent + rope, hidden)
        yield from weight(f"{name}.self_attn.kv_b_proj", heads * (nope + value), latent)
        yield from weight(f"{name}.self_attn.o_proj", hidden, heads * value)
        yield f"{name}.self_attn.q_a_layernorm.weight", "BF16", [query]
        yield f"{name}.self_attn.kv_a_layernorm.weight", "BF16", [latent]
        blocks = {f"{name}.mlp": config["intermediate_size"]}
        if layer >= config["first_k_dense_replace"]:
            experts, wide = config["n_routed_experts"], config["moe_intermediate_size"]
            yield f"{name}.mlp.gate.weight", "BF16", [experts, hidden]
            yield f"{name}.mlp.gate.e_score_correction_bias", "F32", [experts]
            blocks = {f"{name}.mlp.experts.{number}": wide for number in range(experts)}
            blocks[f"{name}.mlp.shared_experts"] = wide * config["n_shared_experts"]
        for block, wide in blocks.items():
            yield from weight(f"{block}.gate_proj", wide, hidden)
            yield from weight(f"{block}.up_proj", wide, hidden)
            yield from weight(f"{block}.down_proj", hidden, wide)
        yield f"{name}.input_layernorm.weight", "BF16", [hidden]
        yield f"{name}.post_attention_layernorm.weight", "BF16", [hidden]
    yield "model.norm.weight", "BF16", [hidden]
    yield from linear("lm_head", vocab, hidden)


GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "dtype": "bfloat16",
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
}


def gpt_oss(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, wide, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    heads, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    yield from linear("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield from linear(f"{name}.self_attn.q_proj", heads, hidden, bias=True)
        yield from linear(f"{name}.self_attn.k_proj", kv, hidden, bias=True)
        yield from linear(f"{name}.self_attn.v_proj", kv, hidden, bias=True)
        yield from linear(f"{name}.self_attn.o_proj", hidden, heads, bias=True)
        yield f"{name}.self_attn.sinks", "BF16", [config["num_attention_heads"]]
        yield from linear(f"{name}.mlp.router", experts, hidden, bias=True)
        for projection, rows, columns in (("gate_up_proj", 2 * wide, hidden), ("down_proj", hidden, wide)):
            yield f"{name}.mlp.experts.{projection}_blocks", "U8", [experts, rows, columns // 32, 16]
            yield f"{name}.mlp.experts.{projection}_scales", "U8", [experts, rows, columns // 32]
            yield f"{name}.mlp.experts.{projection}_bias", "BF16", [experts, rows]
        yield f"{name}.input_layernorm.weight", "BF16", [hidden]
        yield f"{name}.post_attention_layernorm.weight", "BF16", [hidden]
    yield "model.norm.weight", "BF16", [hidden]
    yield from linear("lm_head", config["vocab_size"], hidden)


LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def llama(config: dict[str, Any]) -> Iterator[Tensor]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    yield from linear("model.embed_tokens", config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield from linear(f"{name}.self_attn.q_proj", heads, hidden)
        yield from linear(f"{name}.self_attn.k_proj", kv, hidden)
        yield from linear(f"{name}.self_attn.v_proj", kv, hidden)
        yield from linear(f"{name}.self_attn.o_proj", hidden, heads)
        yield from linear(f"{name}.mlp.gate_proj", wide, hidden)
        yield from linear(f"{name}.mlp.up_proj", wide, hidden)
        yield from linear(f"{name}.mlp.down_proj", hidden, wide)
        yield f"{name}.input_layernorm.weight", "BF16", [hidden]
        yield f"{name}.post_attention_layernorm.weight", "BF16", [hidden]
    yield "model.norm.weight", "BF16", [hidden]
    yield from linear("lm_head", config["vocab_size"], hidden)


SHAPES: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Iterator[Tensor]]]] = {
    "deepseek-v3": (DEEPSEEK, deepseek),
    "deepseek-v3-bf16": ({key: DEEPSEEK[key] for key in DEEPSEEK if key != "quantization_config"}, deepseek),
    "gpt-oss-120b": (GPT_OSS, gpt_oss),
    "llama-70b": (LLAMA_70B, llama),
}


def size_of(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return math.prod(shape) * NBYTES[dtype]


def in_files(tensors: Iterator[Tensor]) -> list[list[Tensor]]:
    """Returns the tensors of each file, in order."""
    files: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + size_of(tensor) > FILE:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += size_of(tensor)
    return files


def write_sparse(file: Path, tensors: list[Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        name, dtype, shape = tensor
        start, end = end, end + size_of(tensor)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as prepared:
        prepared.write(len(text).to_bytes(8, "little") + text)
        prepared.truncate(8 + len(text) + end)


def write_shape(name: str, folder: Path) -> int:
    """Writes the files of a shape into a folder; returns the bytes that its tensors would take."""
    config, tensors = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    files, places = in_files(tensors(config)), {}
    for number, members in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_sparse(folder / file, members)
        places |= {tensor[0]: file for tensor in members}
    total = sum(size_of(tensor) for members in files for tensor in members)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the shape of a large checkpoint as sparse files.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    total = write_shape(arguments.name, arguments.folder)
    print(f"{arguments.folder}: {total:,} bytes of tensors")


if __name__ == "__main__":
    main()
