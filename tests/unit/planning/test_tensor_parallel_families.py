"""What is special about a family's rewritten plan, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from parallel_plans import DIM, HEADS, KV, lengths, partition_of, rewrite, told

from distquant.planning.tensor_parallel import COLWISE, COLWISE_GATHER, GRAD_REDUCE, ROWWISE, ROWWISE_SPLIT


def test_qwen2_biases_change_nothing(make):
    qwen, llama = rewrite(make("qwen2"), 3), rewrite(make("llama"), 3)
    assert (qwen.modules, qwen.partitions, qwen.heads) == (llama.modules, llama.partitions, llama.heads)
    assert make("qwen2").linears["model.layers.0.self_attn.q_proj"].bias


def test_qwen3_norms_reduce_gradients_only_where_attention_is_cut(make):
    plan = rewrite(make("qwen3"), 2)
    assert plan.modules["model.layers.0.self_attn.q_norm"].style == GRAD_REDUCE
    assert told(plan, "k_norm") == [("replicated_with_grad_allreduce", "replicate", "as asked", 2)]
    assert not any("norm" in name for name in plan.replicated)
    whole = rewrite(make("qwen3"), 11)
    assert not any(name.endswith("_norm") for name in whole.modules)


@pytest.mark.parametrize("case", ["phi3", "phi3_mha"])
def test_phi3_packed_projections_are_cut_part_by_part(make, case):
    kv = KV if case == "phi3" else HEADS
    plan = rewrite(make(case), 2)
    q, k = HEADS * DIM, kv * DIM
    qkv = partition_of(plan, "model.layers.0.self_attn.qkv_proj")
    assert qkv.parts == (
        ((0, q // 2), (q, q + k // 2), (q + k, q + k + k // 2)),
        ((q // 2, q), (q + k // 2, q + k), (q + k + k // 2, q + 2 * k)),
    )
    gate_up = partition_of(plan, "model.layers.0.mlp.gate_up_proj")
    assert gate_up.parts == (((0, 384), (704, 1088)), ((384, 704), (1088, 1408)))
    assert plan.modules["model.layers.0.self_attn.qkv_proj"].style == COLWISE
    assert plan.modules["model.layers.0.mlp.down_proj"].style == ROWWISE
    alignments = "multiples of 64 for gate_up_proj, down_proj"
    assert told(plan, "gate_up_proj") == [("colwise_gather_output", "colwise 768+640", alignments, 2)]


def test_gpt_neox_keeps_each_heads_qkv_together(make):
    description = make("gpt_neox")
    plan = rewrite(description, 3, "int8")
    qkv = partition_of(plan, "gpt_neox.layers.0.attention.query_key_value")
    assert qkv.parts == (((0, 288),), ((288, 576),), ((576, 768),))
    assert lengths(plan, "gpt_neox.layers.0.attention.dense") == [96, 96, 64]
    asked = description.tp_plan.get("gpt_neox.embed_in", "no rule")  # since transformers 5.24 it has one
    assert told(plan, "embed_in")[0][:2] == (asked, "vocab_embedding 112+112+96")
    assert lengths(plan, "gpt_neox.layers.1.mlp.dense_4h_to_h") == [240, 240, 224]


@pytest.fixture
def codegen(make):
    """CodeGen with a number of heads; before transformers 5.24 it has no plan, and its attention no known heads."""

    def description(heads: int):
        made = make("codegen", num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads * DIM)
        if "transformer.h.*.attn.qkv_proj" not in made.tp_plan:
            pytest.skip("CodeGen's plan comes with transformers 5.24")
        return made

    return description


@pytest.mark.parametrize(
    ("heads", "ranks", "queries"),
    [(8, 2, [4, 4]), (8, 3, [4, 2, 2]), (8, 4, [2, 2, 2, 2]), (16, 3, [8, 4, 4]), (6, 2, [3, 3])],
)
def test_codegen_keeps_its_packed_blocks_whole(codegen, heads, ranks, queries):
    """Each of 4 blocks has q, v and k of a quarter of the heads: a boundary inside one would mix them up."""
    plan = rewrite(codegen(heads), ranks, "int8")
    qkv = partition_of(plan, "transformer.h.0.attn.qkv_proj")
    assert qkv.lengths == [3 * DIM * count for count in queries]
    assert lengths(plan, "transformer.h.0.attn.out_proj") == [DIM * count for count in queries]
    block = 3 * heads * DIM // 4
    if heads % 4 == 0:
        assert all(start % block == 0 for rank in range(ranks) for start, _ in qkv.segments(rank))


def test_codegen_is_replicated_over_more_ranks_than_blocks(codegen):
    plan = rewrite(codegen(8), 5, "int8")
    reason = "8 query heads are packed in 4 blocks, fewer than 5 ranks"
    assert told(plan, "qkv_proj") == [("colwise", "replicate", reason, 2)]
    assert told(plan, "out_proj") == [("rowwise", "replicate", reason, 2)]


def test_olmo2_gathers_q_and_k_for_their_norms(make):
    plan = rewrite(make("olmo2"), 2)
    assert plan.attentions == {}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert plan.modules[f"model.layers.0.self_attn.{name}"].style == COLWISE_GATHER
    assert plan.modules["model.layers.0.self_attn.o_proj"].style == ROWWISE_SPLIT
    assert lengths(plan, "model.layers.0.self_attn.o_proj") == [128, 128]
    assert told(plan, "o_proj") == [("rowwise_split_input", "rowwise_split 128+128", "on its own, multiples of 64", 2)]


def test_olmo2_where_one_member_cannot_be_cut_is_replicated_as_a_whole(make):
    """o_proj has 2 blocks for 3 ranks: no member of the group keeps a cut, and each rule has one story."""
    description = make("olmo2", hidden_size=64)
    plan = rewrite(description, 3)
    attention = [n for n in description.linears if ".self_attn." in n]
    assert len(attention) == 8
    assert set(attention) <= set(plan.replicated)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert [became for _, became, _, _ in told(plan, f"self_attn.{name}")] == ["replicate"]
    assert not set(attention) & set(plan.modules)
    assert set(plan.partitions) == {shard.partition for shard in plan.modules.values() if shard.partition}


def test_experts_of_unknown_form_stay_whole_and_it_is_said(make):
    description = make("mixtral")
    description = replace(description, experts={}, unknown_experts=dict.fromkeys(description.experts, "another form"))
    plan = rewrite(description, 2)
    patterns = [pattern for pattern in description.tp_plan if ".experts" in pattern]
    assert len(patterns) == 3
    for pattern in patterns:
        why = "experts of this form are replicated over tp"
        assert told(plan, pattern) == [(description.tp_plan[pattern], "replicate", why, 2)]
    assert not any("experts" in name for name in plan.modules)
    assert lengths(plan, "model.layers.0.self_attn.q_proj") == [128, 128]
