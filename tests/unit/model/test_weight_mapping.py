"""Sources against transformers: every parameter rebuilt from them equals what `from_pretrained` loads."""

from __future__ import annotations

import importlib
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

from distquant.errors import Problems
from distquant.model import ModelDescription, Source, build, describe_model
from distquant.model.weight_mapping import check_merged_components, ignorable, map_names, natural, split_component

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BNB = {"weight.absmax": "absmax", "weight.quant_map": "quant_map", "SCB": "SCB"}


def saved(folder: Path, name: str, *, original: bool = True, **more) -> dict[str, torch.Tensor]:
    """Saves a random tiny model as transformers does, and returns the checkpoint's tensors."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.uniform_(-1, 1)
    model.save_pretrained(folder, save_original_format=original)
    return load_file(folder / "model.safetensors")


def described(
    folder: Path, tensors: dict[str, torch.Tensor], problems: Problems | None = None, **suffixes
) -> ModelDescription:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return describe_model(build(folder, None), shapes, suffixes, Problems() if problems is None else problems)


def rebuilt(description: ModelDescription, tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter put together from its sources; what no source fills stays NaN, and no element is filled twice."""
    shape = description.params[name].shape
    value, filled = torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.int64)
    for source in description.sources[name]:
        assert source.component == ""
        part = tensors[source.tensor]
        if source.take is not None:
            dim, start, stop = source.take
            part = part.narrow(dim, start, stop - start)
        offset = source.offset or (0,) * len(shape)
        part = part.reshape((1,) * (len(shape) - part.dim()) + tuple(part.shape))
        where = tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))
        assert source.offset is not None or tuple(part.shape) == shape
        value[where] = part
        filled[where] += 1
    assert torch.all(filled == 1), f"{name} is not filled exactly once"
    return value


INKLING = {
    "head_dim": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 4,
    "d_rel": 4,
    "rel_extent": 16,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": 12, "num_experts_per_tok": 2}),
    "phimoe": ("Phimoe", {"num_local_experts": 3}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 11,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "hrm_text": ("HrmText", {}),
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "phi3": ("Phi3", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {}),
    "exaone": ("Exaone", {}),
    "inkling": (
        "InklingText",
        {
            **INKLING,
            "intermediate_size": 24,
            "n_shared_experts": 1,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "sarvam_moe": (  # q, k and v of unequal sizes in one tensor
        "SarvamMoE",
        {"head_dim": 4, "moe_intermediate_size": 8, "n_routed_experts": 3, "num_experts_per_tok": 2},
    ),
    "lara_mini": (  # four projections of unequal sizes in one tensor
        "LaraMini",
        {
            "head_dim": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 8,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
            "num_experts": 3,
            "num_experts_per_tok": 2,
        },
    ),
}
KNOWN = sorted(case for case, (name, _) in MODELS.items() if hasattr(transformers, f"{name}Config"))
"""Families of this version of transformers."""


@pytest.mark.parametrize("case", KNOWN)
def test_sources_rebuild_what_from_pretrained_loads(tmp_path, case):
    name, more = MODELS[case]
    tensors = saved(tmp_path, name, **more)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    problems = Problems()
    description = described(tmp_path, tensors, problems)
    assert list(problems) == []
    assert (description.unexpected, description.missing) == ((), ())
    assert set(description.params) | set(description.tied) == set(loaded)
    for param in description.params:
        assert torch.equal(rebuilt(description, tensors, param), loaded[param]), param
    for target, source in description.tied.items():
        assert torch.equal(loaded[target], loaded[source])
    used = {source.tensor for sources in description.sources.values() for source in sources}
    assert used == set(tensors)


def test_mixtral_offsets_by_hand(tmp_path):
    """One tensor an expert, numbered by value: expert 10 comes after expert 9, not after expert 1."""
    tensors = saved(tmp_path, "Mixtral", num_local_experts=12)
    moe = "model.layers.1.block_sparse_moe.experts"
    assert f"{moe}.11.w1.weight" in tensors, "this checkpoint is not in Mixtral's own spelling"
    description = described(tmp_path, tensors)
    assert tuple(description.experts) == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    assert description.params["model.layers.1.mlp.experts.gate_up_proj"].shape == (12, 48, 16)
    assert description.sources["model.layers.1.mlp.experts.gate_up_proj"] == (
        *(Source(f"{moe}.{i}.w1.weight", "", (i, 0, 0)) for i in range(12)),
        *(Source(f"{moe}.{i}.w3.weight", "", (i, 24, 0)) for i in range(12)),
    )
    down = description.sources["model.layers.1.mlp.experts.down_proj"]
    assert down == tuple(Source(f"{moe}.{i}.w2.weight", "", (i, 0, 0)) for i in range(12))
    router = "model.layers.0.mlp.gate.weight"
    assert description.sources[router] == (Source("model.layers.0.block_sparse_moe.gate.weight"),)


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_an_absent_expert_leaves_its_parameter_short(tmp_path, part):
    """What a completeness check looks at: the sources cover fewer elements than the parameter has."""
    tensors = saved(tmp_path, "Mixtral", num_local_experts=4)
    del tensors[f"model.layers.0.block_sparse_moe.experts.1.{part}.weight"]
    name = f"model.layers.0.mlp.experts.{'down_proj' if part == 'w2' else 'gate_up_proj'}"
    description = described(tmp_path, tensors)
    covered = sum(tensors[source.tensor].numel() for source in description.sources[name])
    assert covered == math.prod(description.params[name].shape) - 24 * 16


def test_no_source_lies_outside_its_parameter(tmp_path):
    """A gate too few and an up too many: the elements add up, but the fifth up has no slot in four experts."""
    tensors = saved(tmp_path, "Mixtral", num_local_experts=4)
    moe = "model.layers.0.block_sparse_moe.experts"
    tensors[f"{moe}.4.w3.weight"] = tensors.pop(f"{moe}.1.w1.weight")
    problems = Problems()
    description = described(tmp_path, tensors, problems)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    reported = name in description.missing or f"{moe}.4.w3.weight" in description.unexpected or bool(problems)
    assert reported or all(source.offset[0] < 4 for source in description.sources[name])


def test_chunked_tensor_is_taken_in_parts(tmp_path):
    tensors = saved(tmp_path, "HrmText")
    description = described(tmp_path, tensors)
    taken = [s for sources in description.sources.values() for s in sources if s.take is not None]
    packed = {name for name in tensors if name.endswith(("gate_up_proj.weight", "gqkv_proj.weight"))}
    assert packed
    assert {source.tensor for source in taken} == packed
    for name in packed:
        block_shape = sorted(source.take for source in taken if source.tensor == name)
        assert block_shape[0][1] == 0
        assert block_shape[-1][2] == tensors[name].shape[0]
        assert all(a[2] == b[1] for a, b in pairwise(block_shape))


def concatenating(tmp_path, monkeypatch, operations, dims):
    """Llama with a mapping of our own that makes q_proj of several checkpoint tensors."""
    saved(tmp_path, "Llama")
    converter = WeightConverter(["self_attn.a.weight", "self_attn.b.weight"], "self_attn.q_proj.weight", operations)
    mapping = importlib.import_module("transformers.conversion_mapping")
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: [converter])
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        whole = tensors.pop(f"model.layers.{layer}.self_attn.q_proj.weight")
        first, second = whole.split([6, 10], dim=dims)
        tensors[f"model.layers.{layer}.self_attn.b.weight"] = second.contiguous()
        tensors[f"model.layers.{layer}.self_attn.a.weight"] = first.contiguous()
    problems = Problems()
    return described(tmp_path, tensors, problems), tensors, problems


@pytest.mark.parametrize("dim", [0, 1])
def test_concatenated_tensors_follow_the_order_of_the_patterns(tmp_path, monkeypatch, dim):
    description, tensors, problems = concatenating(tmp_path, monkeypatch, [Concatenate(dim=dim)], dim)
    assert not problems
    whole = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(rebuilt(description, tensors, name), whole[name])
    assert description.missing == ()


def test_unknown_conversion_is_a_problem(tmp_path, monkeypatch):
    description, _, problems = concatenating(tmp_path, monkeypatch, [Transpose(0, 1)], 0)
    reported = [str(problem) for problem in problems]
    assert reported == [
        "model.layers.0.self_attn.q_proj.weight: unsupported conversion from the checkpoint's form: Transpose (and 1 "
        "more of its kind). Only merging, concatenating, splitting and chunking are supported: load the checkpoint "
        "with transformers, and save it with save_pretrained(..., save_original_format=False)"
    ]
    targets = tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    assert description.unconverted == targets
    assert description.missing == (), "the checkpoint has them, so one cause would be told twice"
    assert not set(targets) & set(description.sources)


needs_dory = pytest.mark.skipif(not hasattr(transformers, "DoryConfig"), reason="Dory comes with transformers 5.24")


@needs_dory
def test_pairs_of_blocks_collapse_into_layers(tmp_path):
    """Dory's checkpoints have attention and mlp of a layer as two blocks; transformers does not save that form."""
    parts = {
        "self_attn": (0, "mixer"),
        "mlp": (1, "mixer"),
        "lambda_1": (0, "attn_alpha"),
        "lambda_2": (1, "mlp_alpha"),
    }
    own = saved(
        tmp_path, "Dory", head_dim=4, n_input_layers=1, n_output_layers=1, num_hidden_layers=4, sliding_window=8
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()

    def paired(found: re.Match[str]) -> str:
        block, part = parts[found[2]]
        return f"layers.{2 * int(found[1]) + block}.{part}"

    pairs = {re.sub(rf"layers\.(\d+)\.({'|'.join(parts)})\b", paired, name): tensor for name, tensor in own.items()}
    assert {"backbone.layers.7.mixer.up_proj.weight", "backbone.layers.6.attn_alpha"} <= set(pairs)
    save_file(pairs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole), "this form is not what transformers reads"
    problems = Problems()
    description = described(tmp_path, pairs, problems)
    assert not problems
    assert (description.unexpected, description.missing) == ((), ())
    for name in description.params:
        assert torch.equal(rebuilt(description, pairs, name), loaded[name]), name


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("name", ["Inkling2Text", "Inkling2LoopText"])
def test_inkling_is_taken_as_it_is_or_refused(tmp_path, name, original):
    """Its experts have interleaved rows, or codes, in the original form. The padded head is cut to the vocabulary."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"{name} comes with a later transformers")
    more = {**INKLING, "unpadded_vocab_size": 30, "n_layers_per_attn_res_block": 1}
    tensors = saved(tmp_path, name, original=original, **more)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    problems = Problems()
    description = described(tmp_path, tensors, problems)
    assert (description.unexpected, description.missing) == ((), ())
    refused = {name for name in description.params if "experts" in name or name.endswith("message_input.query")}
    if name == "Inkling2Text":
        refused = {name for name in refused if name.endswith("gate_up_proj")}
    assert set(description.unconverted) == (refused if original else set())
    kinds = {problem.where.rpartition(".")[2] for problem in problems}
    assert kinds == {name.rpartition(".")[2] for name in description.unconverted}
    assert len(list(problems)) == len(kinds), "a kind is told once"
    assert set(description.sources) == set(description.params) - set(description.unconverted)
    for param in description.sources:
        assert torch.equal(rebuilt(description, tensors, param), loaded[param]), param


def test_base_model_prefix_is_added(tmp_path):
    """A checkpoint of the bare model (no `model.`) fills the causal model; the absent head is reported."""
    tensors = saved(tmp_path, "Llama")
    bare = {n.removeprefix("model."): t for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    description = described(tmp_path, bare)
    assert description.missing == ("lm_head.weight",)
    assert description.unexpected == ()
    assert description.sources["model.norm.weight"] == (Source("norm.weight"),)
    for name in description.sources:
        assert torch.equal(rebuilt(description, bare, name), loaded[name])


def test_base_model_prefix_is_stripped(tmp_path):
    """A checkpoint of the causal model fills the bare one; its head has no place."""
    tensors = saved(tmp_path, "Llama")
    bare = build(tmp_path, None).base_model
    params = {name: tuple(param.shape) for name, param in bare.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = Problems()
    sources, _, unexpected = map_names(bare, params, shapes, {}, problems)
    assert not problems
    assert sources == {name: (Source(f"model.{name}"),) for name in params}
    assert unexpected == ("lm_head.weight",)


def test_unexpected_and_missing(tmp_path):
    tensors = saved(tmp_path, "Llama")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.2.mlp.up_proj.weight"] = lost
    tensors["vision.patch.weight"] = lost
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = lost
    description = described(tmp_path, tensors)
    assert description.missing == ("model.layers.1.mlp.up_proj.weight",)
    assert description.unexpected == ("model.layers.2.mlp.up_proj.weight", "vision.patch.weight")
    assert "model.layers.1.mlp.up_proj.weight" not in description.sources


def test_components_go_with_their_weight(tmp_path):
    tensors = saved(tmp_path, "Llama")
    base = "model.layers.0.mlp.up_proj"
    tensors[f"{base}.weight.absmax"] = torch.zeros(6)
    tensors[f"{base}.SCB"] = torch.zeros(24)
    description = described(tmp_path, tensors, **BNB)
    assert set(description.sources[f"{base}.weight"]) == {
        Source(f"{base}.weight"),
        Source(f"{base}.weight.absmax", "absmax"),
        Source(f"{base}.SCB", "SCB"),
    }
    assert (description.unexpected, description.missing) == ((), ())
    assert described(tmp_path, tensors).unexpected == (f"{base}.SCB", f"{base}.weight.absmax")


def test_component_of_a_converted_weight_is_a_problem(tmp_path):
    tensors = saved(tmp_path, "Mixtral", num_local_experts=2)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight.absmax"
    tensors[name] = torch.zeros(6)
    problems = Problems()
    check_merged_components(described(tmp_path, tensors, **BNB).parts, problems)
    (problem,) = problems
    assert problem.where == name
    assert "'absmax'" in problem.what
    assert "model.layers.0.mlp.experts.down_proj" in problem.what


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.b.weight", ("a.b.weight", "")),
        ("a.b.weight.absmax", ("a.b.weight", "absmax")),
        ("a.b.weight.quant_map", ("a.b.weight", "quant_map")),
        ("a.b.SCB", ("a.b.weight", "SCB")),
        ("a.b.xSCB", ("a.b.xSCB", "")),
        ("a.b.weight.nested_absmax", ("a.b.weight.nested_absmax", "")),
        ("a.b.bias", ("a.b.bias", "")),
    ],
)
def test_split_component(name, expected):
    assert split_component(name, BNB) == expected


def test_natural_order():
    names = ["e.10.w", "e.9.w", "e.1.w", "e.w", "d.2", "e.1.v"]
    assert sorted(names, key=natural) == ["d.2", "e.1.v", "e.1.w", "e.9.w", "e.10.w", "e.w"]


def test_ignorable():
    assert ignorable(["a.inv_freq", "b", "c.inv_freq.d"], [r"inv_freq$", "^z"]) == (
        {"a.inv_freq"},
        ["b", "c.inv_freq.d"],
    )
    assert ignorable(["a"], None) == (set(), ["a"])
    assert ignorable(["a"], []) == (set(), ["a"])
