"""The description of small configs: modules, dtypes, ties, heads and experts, and configs that cannot be built."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from distquant.errors import InputError, Problems
from distquant.model import Attention, Linear, ModelDescription, Source, build, describe_model
from distquant.model.description import wildcard

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def description_of(folder, name: str, drop: tuple[str, ...] = (), dtype: str | None = None, **more) -> ModelDescription:
    getattr(transformers, f"{name}Config")(**{**SMALL, **more}).save_pretrained(folder)
    model = build(folder, dtype)
    tensors = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in drop}
    problems = Problems()
    description = describe_model(model, tensors, {}, problems)
    assert not problems
    return description


def test_llama(tmp_path):
    description = description_of(tmp_path, "Llama")
    assert (description.model_type, description.architecture) == ("llama", "LlamaForCausalLM")
    assert description.attentions == {
        f"model.layers.{i}.self_attn": Attention(f"model.layers.{i}.self_attn", 8, 2, 8) for i in range(2)
    }
    assert description.linears["model.layers.1.mlp.down_proj"] == Linear("model.layers.1.mlp.down_proj", 64, 96, False)
    assert len(description.linears) == 2 * 7 + 1
    assert description.params["model.layers.0.self_attn.k_proj.weight"].shape == (16, 64)
    assert (description.input_embedding, description.output_embedding) == ("model.embed_tokens", "lm_head")
    assert description.embeddings == ("model.embed_tokens",)
    assert (description.experts, description.tied, description.missing, description.unexpected) == ({}, {}, (), ())
    assert description.default_skip == ("lm_head",)
    assert description.tp_plan["model.layers.*.mlp.down_proj"] == "rowwise"
    assert description.tp_plan["lm_head"] == "colwise_gather_output"
    assert description.no_split == ("LlamaDecoderLayer",)
    assert "model.layers.1.self_attn.q_proj" in description.modules
    assert "" not in description.modules
    assert description.sources["model.norm.weight"] == (Source("model.norm.weight"),)


def test_nothing_is_allocated(tmp_path):
    transformers.LlamaConfig(**{**SMALL, "vocab_size": 10**8, "hidden_size": 8192}).save_pretrained(tmp_path)
    model = build(tmp_path, "bfloat16")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not model.training


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [("bfloat16", None, "bfloat16"), (None, None, "float32"), ("bfloat16", "float16", "float16")],
)
def test_dtype(tmp_path, config, asked, expected):
    transformers.LlamaConfig(**SMALL, dtype=config).save_pretrained(tmp_path)
    description = describe_model(build(tmp_path, asked), {}, {}, Problems())
    assert {param.dtype for param in description.params.values()} == {expected}


def test_building_leaves_torchs_default_dtype_alone(tmp_path):
    description_of(tmp_path, "Llama", dtype="bfloat16")
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(
    ("drop", "tied", "loaded"),
    [
        (("lm_head.weight",), {"lm_head.weight": "model.embed_tokens.weight"}, "model.embed_tokens.weight"),
        (("model.embed_tokens.weight",), {"model.embed_tokens.weight": "lm_head.weight"}, "lm_head.weight"),
    ],
)
def test_tied_embedding_loads_the_one_that_the_checkpoint_holds(tmp_path, drop, tied, loaded):
    description = description_of(tmp_path, "Llama", drop, tie_word_embeddings=True)
    assert description.tied == tied
    assert loaded in description.params
    assert next(iter(tied)) not in description.params
    assert description.sources[loaded] == (Source(loaded),)
    assert description.missing == ()


def test_tied_embedding_with_both_in_the_checkpoint_loads_both(tmp_path):
    description = description_of(tmp_path, "Llama", tie_word_embeddings=True)
    assert description.tied == {}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(description.params)


def test_tied_embedding_with_neither_in_the_checkpoint_is_missing_once(tmp_path):
    drop = ("lm_head.weight", "model.embed_tokens.weight")
    description = description_of(tmp_path, "Llama", drop, tie_word_embeddings=True)
    assert description.missing == ("model.embed_tokens.weight",)


def test_qwen2_biases(tmp_path):
    description = description_of(tmp_path, "Qwen2")
    biased = {name.rpartition(".")[2] for name, linear in description.linears.items() if linear.bias}
    assert biased == {"q_proj", "k_proj", "v_proj"}
    assert description.params["model.layers.0.self_attn.k_proj.bias"].shape == (16,)


def test_gpt_neox_heads(tmp_path):
    description = description_of(tmp_path, "GPTNeoX", num_key_value_heads=8)
    assert description.attentions["gpt_neox.layers.0.attention"] == Attention("gpt_neox.layers.0.attention", 8, 8, 8)
    assert description.linears["gpt_neox.layers.0.attention.query_key_value"].out_features == 192


def test_gpt2_is_transposed(tmp_path):
    transformers.GPT2Config(n_embd=64, n_layer=1, n_head=8, vocab_size=48, n_positions=16).save_pretrained(tmp_path)
    model = build(tmp_path, None)
    description = describe_model(model, {n: tuple(t.shape) for n, t in model.state_dict().items()}, {}, Problems())
    packed = description.linears["transformer.h.0.attn.c_attn"]
    assert packed == Linear("transformer.h.0.attn.c_attn", 192, 64, True, transposed=True)
    assert description.params["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)


def test_mixtral_experts(tmp_path):
    description = description_of(tmp_path, "Mixtral", num_local_experts=4)
    assert tuple(description.experts) == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert description.params["model.layers.0.mlp.experts.down_proj"].shape == (4, 64, 96)


def test_persistent_buffers_are_named_as_such(tmp_path):
    description = description_of(tmp_path, "Falcon", alibi=False, num_kv_heads=2)
    assert not any(param.buffer for param in description.params.values())
    (tmp_path / "moe").mkdir()
    more = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 8,
    }
    description = description_of(tmp_path / "moe", "DeepseekV3", dtype="bfloat16", num_experts_per_tok=2, **more)
    buffers = {name: param.dtype for name, param in description.params.items() if param.buffer}
    assert buffers == {"model.layers.1.mlp.gate.e_score_correction_bias": "float32"}


def test_quantized_checkpoints_are_built_plain(tmp_path):
    config = transformers.LlamaConfig(**SMALL).to_dict()
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(tmp_path, "bfloat16")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"config\.json"),
        ('{"model_type": "no_such_model"}', r"no_such_model"),
        ("{}", r"model_type"),
        ('{"model_type": "vit"}', r"ViTModel \(vit\) is no causal"),
        ("{", r"config\.json"),
    ],
)
def test_what_cannot_be_built(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        build(tmp_path, None)
    (problem,) = caught.value.problems
    assert problem.where == str(tmp_path)
    assert ("Load it with AutoModel" if text and "vit" in text else "check config.json") in problem.fix


def test_code_from_the_checkpoint_needs_trust(tmp_path):
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "own.py").write_text("raise SystemExit('must not run')")
    with pytest.raises(InputError, match="trust_remote_code=True"):
        build(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.10.mlp.up_proj", "model.layers.*.mlp.up_proj"),
        ("model.layers.0.experts.3.w1", "model.layers.*.experts.*.w1"),
        ("model.layers.7", "model.layers.*"),
        ("model.h2.conv1d", "model.h2.conv1d"),
        ("lm_head", "lm_head"),
    ],
)
def test_wildcard(name, expected):
    assert wildcard(name) == expected
