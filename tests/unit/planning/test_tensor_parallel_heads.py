"""Attention in rewritten plans: whole heads on whole blocks, repeated kv heads, and when it is left whole."""

from __future__ import annotations

from parallel_plans import lengths, partition_of, rewrite, told
from partitions import held


def test_kv_heads_are_repeated_at_tp_4(make):
    plan = rewrite(make("llama"), 4)
    heads = plan.heads[plan.attentions["model.layers.0.self_attn"].heads]
    assert [held(heads.kv, rank) for rank in range(4)] == [[0], [0], [1], [1]]
    assert heads.groups == (2, 2, 2, 2)
    assert partition_of(plan, "model.layers.0.self_attn.v_proj").parts == (
        ((0, 32),),
        ((0, 32),),
        ((32, 64),),
        ((32, 64),),
    )
    why = "2 kv heads are repeated; query heads 2+2+2+2, kv heads 1+1+1+1"
    assert told(plan, "self_attn.k_proj") == [("colwise", "colwise 32+32+32+32", why, 2)]


def test_kv_heads_at_tp_3_where_groups_straddle_ranks(make):
    plan = rewrite(make("llama"), 3, "int8")
    heads = plan.heads[plan.attentions["model.layers.0.self_attn"].heads]
    assert heads.query.lengths == [3, 3, 2]
    assert [held(heads.kv, rank) for rank in range(3)] == [[0], [0, 1, 1], [1]]
    assert heads.groups == (3, 1, 2)


def test_preferred_blocks_come_before_even_heads(make):
    """Heads of 32 in NF4's blocks of 64 go out in pairs, although single heads would fit blocks of 32."""
    plan = rewrite(make("llama"), 3)
    heads = plan.heads[plan.attentions["model.layers.0.self_attn"].heads]
    assert heads.query.lengths == [4, 2, 2]
    assert [held(heads.kv, rank) for rank in range(3)] == [[0], [1], [1]]
    assert partition_of(plan, "model.layers.0.self_attn.o_proj").legal(64)


def test_more_ranks_than_heads_replicates_the_attention_only(make):
    plan = rewrite(make("llama"), 11)
    why = "8 query heads are fewer than 11 ranks"
    assert told(plan, "self_attn.o_proj") == [("rowwise", "replicate", why, 2)]
    assert {n.rpartition(".")[2] for n in plan.replicated} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert plan.attentions == {}
    assert plan.heads == {}
    assert lengths(plan, "model.layers.1.mlp.up_proj") == [64] * 11
    assert lengths(plan, "lm_head") == lengths(plan, "model.embed_tokens")


def test_heads_that_miss_the_blocks_are_replicated(make):
    """Heads of 8 over blocks of 32: three ranks cannot get whole blocks of whole heads."""
    description = make("llama", hidden_size=64)
    why = "no partition of 8 heads of 8 over 3 ranks is aligned to 32"
    assert told(rewrite(description, 3), "self_attn.o_proj") == [("rowwise", "replicate", why, 2)]
    assert rewrite(description, 3, "int8").attentions != {}


def test_heads_are_grouped_until_they_fall_on_blocks(make):
    """Heads of 16 in blocks of 32 go out in pairs."""
    plan = rewrite(make("llama", hidden_size=128, num_key_value_heads=8), 3)
    heads = plan.heads[plan.attentions["model.layers.0.self_attn"].heads]
    assert heads.query.lengths == [4, 2, 2]
