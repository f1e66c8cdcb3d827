"""What cannot work with mixtures of experts is told from configs and headers, with what it is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import changed

import distquant as dq
from distquant import InputError

EP = {"quantization_config": "nf4-dq", "mesh": "ep=2"}
ROUTERS = {
    "mixtral": "model.layers.1.block_sparse_moe.gate.weight",
    "deepseek-v3": "model.layers.2.mlp.gate.weight",
    "gpt-oss": "model.layers.0.mlp.router.weight",
    "llama4": "model.layers.1.feed_forward.router.weight",
}
SHARED = {
    "qwen2-moe": "model.layers.1.mlp.shared_expert.up_proj.weight",
    "deepseek-v3": "model.layers.1.mlp.shared_experts.down_proj.weight",
    "llama4": "model.layers.2.feed_forward.shared_expert.gate_proj.weight",
}


@pytest.fixture
def spoiled(moe_of: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """A copy of a family's checkpoint without the tensors named, and with other fields in its config."""

    def copy(family: str, *without: str, **config: Any) -> str:
        def drop(tensors: dict[str, Any]) -> None:
            for name in without:
                del tensors[name]

        return changed(moe_of(family), tmp_path / "spoiled", drop, **config)

    return copy


@pytest.mark.parametrize(("mesh", "experts"), [("ep=6", 5), ("ep=8,tp=2", 5)])
def test_more_ranks_than_experts(moe_of: Callable[..., str], mesh: str, experts: int) -> None:
    with pytest.raises(InputError, match=rf"{mesh[:4]}\b.*\b{experts} experts"):
        dq.plan(moe_of("gpt-oss"), quantization_config="nf4-dq", mesh=mesh)


@pytest.mark.parametrize("quant", ["none", "nf4-dq"])
def test_expert_axis_on_a_dense_model(kjv_tiny: str, quant: str) -> None:
    with pytest.raises(InputError, match=r"ep=2, and LlamaForCausalLM has no experts"):
        dq.plan(kjv_tiny, quantization_config=quant, mesh="ep=2")


def of_another_form(kind: str, folder: Path) -> tuple[str, str]:
    """A model of transformers whose experts are held in a form of its own: its checkpoint, and such a module."""
    from transformers import AutoModelForCausalLM, DbrxConfig, JetMoeConfig

    small: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "jetmoe":
        config: Any = JetMoeConfig(
            **small,
            hidden_size=32,
            num_hidden_layers=1,
            num_key_value_heads=2,
            kv_channels=16,
            intermediate_size=32,
            num_local_experts=4,
        )
        module = "model.layers.0.mlp.input_linear"
    else:
        ffn = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 1}
        attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}
        config = DbrxConfig(
            **small, d_model=32, n_heads=2, n_layers=1, max_seq_len=64, ffn_config=ffn, attn_config=attention
        )
        module = "transformer.blocks.0.ffn.experts"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder), module


@pytest.mark.parametrize("quant", ["none", "nf4-dq"])
@pytest.mark.parametrize("kind", ["jetmoe", "dbrx"])
def test_experts_of_a_form_that_is_not_known(tmp_path: Path, kind: str, quant: str) -> None:
    """The module is named, with what was expected of it."""
    path, module = of_another_form(kind, tmp_path / kind)
    with pytest.raises(InputError, match=rf"{module}.*(gate_up_proj|down_proj)"):
        dq.plan(path, quantization_config=quant, mesh="ep=2")


@pytest.mark.parametrize(("kind", "patterns"), [("jetmoe", [".*input_linear", ".*output_linear"]), ("dbrx", [".*mlp"])])
def test_unknown_experts_stay_as_they_are_on_one_rank(tmp_path: Path, kind: str, patterns: list[str]) -> None:
    """They need no cut there. Quantization has to leave them out by name, and the plan says that it does."""
    path, module = of_another_form(kind, tmp_path / kind)
    assert dq.plan(path, quantization_config="none").memory[0].quantized == 0
    with pytest.raises(InputError, match=rf"{module}.*unknown form of experts") as caught:
        dq.plan(path, quantization_config="nf4-dq")
    assert all(any(repr(pattern) in problem.fix for pattern in patterns) for problem in caught.value.problems)
    skip = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": patterns}
    plan = dq.plan(path, quantization_config=skip)
    assert [note for note in plan.notes if "left unquantized" in note and "experts" in note]


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_other_tensors_of_three_dims_are_no_experts(tmp_path: Path, kind: str) -> None:
    """Kernels of convolutions `[channels, 1, width]`, vectors `[1, 1, hidden]`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    model = AutoModelForCausalLM.from_config(config)
    assert [name for name, value in model.named_parameters() if value.dim() == 3]
    model.save_pretrained(tmp_path / kind)
    plan = dq.plan(tmp_path / kind, quantization_config="nf4-dq")
    assert plan.converted
    assert not [note for note in plan.notes if "experts" in note]
    with pytest.raises(InputError, match="has no experts"):
        dq.plan(tmp_path / kind, quantization_config="nf4-dq", mesh="ep=2")


@pytest.mark.parametrize("family", ROUTERS)
def test_router_is_missing(spoiled: Callable[..., str], family: str) -> None:
    path = spoiled(family, ROUTERS[family])
    with pytest.raises(InputError, match=r"(gate|router)\.weight: the checkpoint has no tensor for it"):
        dq.plan(path, **EP)


@pytest.mark.parametrize("family", SHARED)
def test_shared_expert_is_missing(spoiled: Callable[..., str], family: str) -> None:
    path = spoiled(family, SHARED[family])
    with pytest.raises(InputError, match=r"shared_experts?\.\w+_proj\.weight: the checkpoint has no tensor for it"):
        dq.plan(path, **EP)


@pytest.mark.parametrize("mesh", [None, "ep=2", "tp=2"])
@pytest.mark.parametrize(("number", "part", "projection"), [(3, "w1", "gate"), (7, "w2", "down"), (0, "w3", "up")])
def test_one_tensor_of_one_expert_is_missing(
    spoiled: Callable[..., str], mesh: str | None, number: int, part: str, projection: str
) -> None:
    """The others must not move up to its place."""
    path = spoiled("mixtral", f"model.layers.1.block_sparse_moe.experts.{number}.{part}.weight")
    name = rf"model\.layers\.1\.mlp\.experts\.{number}\.{projection}_proj\.weight"
    with pytest.raises(InputError, match=rf"{name}: the checkpoint has no tensor for it") as caught:
        dq.plan(path, quantization_config="nf4-dq", mesh=mesh)
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts"):
        dq.plan(path, quantization_config="none", mesh=mesh)


@pytest.mark.parametrize("mesh", [None, "ep=2"])
@pytest.mark.parametrize("form", ["hub", "fused"])
def test_more_experts_in_the_file_than_in_the_config(
    moe_of: Callable[..., str], tmp_path: Path, mesh: str | None, form: str
) -> None:
    path = changed(moe_of("mixtral", form), tmp_path / "more", lambda tensors: None, num_local_experts=6)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts.*check config\.json"):
        dq.plan(path, quantization_config="nf4-dq", mesh=mesh)


@pytest.mark.parametrize("form", ["hub", "fused"])
def test_experts_of_another_size_than_in_the_config(moe_of: Callable[..., str], tmp_path: Path, form: str) -> None:
    path = changed(moe_of("mixtral", form), tmp_path / "other", lambda tensors: None, intermediate_size=64)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.experts.*config\.json"):
        dq.plan(path, quantization_config="nf4-dq", mesh="ep=2")


@pytest.mark.parametrize("mesh", [None, "ep=2"])
def test_experts_that_are_quantized_in_one_float8_tensor(
    moe_of: Callable[..., str], tmp_path: Path, mesh: str | None
) -> None:
    """As transformers holds them; the scales lie beside them."""
    quantized = ("experts.gate_up_proj", "experts.down_proj", "q_proj.weight")

    def quantize(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(quantized)]:
            *many, rows, columns = tensors[name].shape
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(*many, -(-rows // 32), -(-columns // 32))

    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}}
    path = changed(moe_of("mixtral", "fused"), tmp_path / "quantized", quantize, **config)
    with pytest.raises(InputError) as caught:
        dq.plan(path, mesh=mesh)
    assert caught.value.problems
    for problem in caught.value.problems:
        assert "mlp.experts." in problem.where
        assert "stored as F8_E4M3: experts that are quantized in one tensor" in problem.what
        assert "a tensor for each expert" in problem.fix


def test_unknown_way_to_the_experts(moe_of: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"dispatch.*'all_to_none'.*all_to_all"):
        dq.plan(moe_of("mixtral"), dispatch="all_to_none", **EP)


def test_experts_that_see_every_token_are_not_sent_any(moe_of: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"dispatch.*feed_forward\.experts.*every token.*all_reduce"):
        dq.plan(moe_of("llama4"), dispatch="all_to_all", **EP)


@pytest.mark.parametrize("pattern", ["model.layers.0.mlp.experts", r".*\.experts", r".*\.experts.*down_proj"])
def test_selection_takes_experts_by_module_or_projection(moe_of: Callable[..., str], pattern: str) -> None:
    """All experts of a stack alike; what is left out is told."""
    skipped = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": [pattern]}
    plan = dq.plan(moe_of("mixtral"), quantization_config=skipped, mesh="ep=2")
    left = [t.name for t in plan.tensors if ".experts." in t.name and t.scheme == "none"]
    expected = {
        "model.layers.0.mlp.experts": 3,
        r".*\.experts": 6,
        r".*\.experts.*down_proj": 2,
    }
    assert len(left) == expected[pattern]
    assert all("down_proj" in name for name in left) == ("down_proj" in pattern)
    chosen = {"quant_method": "bitsandbytes", "load_in_4bit": True, "include_modules": [pattern]}
    plan = dq.plan(moe_of("mixtral"), quantization_config=chosen, mesh="ep=2")
    assert sorted(t.name for t in plan.tensors if t.scheme != "none") == sorted(left)
