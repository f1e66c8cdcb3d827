"""Rewritten tensor-parallel plans of every model, at every width and size: exact cuts, and heads that fit."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from parallel_plans import LAYOUTS, MODELS, layout_of, lengths, partition_of, rewrite, told
from partitions import assert_owned_partitions, held

from distquant.model import ModelDescription
from distquant.model.description import wildcard
from distquant.planning.tensor_parallel import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
    ParallelPlan,
)
from distquant.sharding.layout import PLAIN_STEPS

WIDTHS = [2, 3, 4, 8]


def assert_sound(description: ModelDescription, plan: ParallelPlan, ranks: int, layout: str) -> None:
    """What holds for every model: sizes, coverage, units, no empty shard, one story per rule."""
    checked = set()
    for name, shard in plan.modules.items():
        if shard.style == GRAD_REDUCE:
            continue
        partition = plan.partitions[shard.partition]
        if shard.style == VOCAB_EMBEDDING:
            size, alignments = description.params[f"{name}.weight"].shape[0], PLAIN_STEPS
        else:
            linear = description.linears[name]
            dim = {COLWISE: 0, COLWISE_GATHER: 0, ROWWISE: 1, ROWWISE_SPLIT: 1}[shard.style]
            shape = (linear.out_features, linear.in_features)
            size, alignments = shape[dim], layout_of(description, layout)(name).alignments(shape, dim)
        assert partition.size == size, name
        assert len(partition.parts) == ranks
        assert min(partition.lengths) > 0, name
        assert any(partition.legal(alignment) for alignment in alignments), (
            f"{name}: {partition} is off its units {alignments}"
        )
        if shard.partition not in checked:
            assert_owned_partitions(partition)
            checked.add(shard.partition)
        if shard.style != COLWISE:
            assert partition.repeated == 0, name
    assert not set(plan.modules) & set(plan.replicated)
    assert all(plan.replicated.values())
    expected = Counter(
        wildcard(n) for n in (*description.modules, *description.params) if wildcard(n) in description.tp_plan
    )
    stories = Counter(rule.pattern for rule in plan.rules)
    assert set(stories.values()) == {1}, "a rule is told twice"
    for rule in plan.rules:
        assert rule.reason
        assert rule.asked == description.tp_plan.get(rule.pattern, "no rule")
        assert rule.modules == expected.get(rule.pattern, 1)
    assert set(description.tp_plan) <= set(stories)


HOLDS = {
    "q_proj": "query",
    "k_proj": "kv",
    "v_proj": "kv",
    "o_proj": "query",
    "dense": "query",
    "qkv_proj": "packed",
    "query_key_value": "per head",
}


def assert_heads(description: ModelDescription, plan: ParallelPlan, ranks: int) -> None:
    """Follows rows of q, k, v to heads: every local query head meets its own kv head, and o takes the same heads."""
    for name, attention in description.attentions.items():
        cut_modules = [m for m, s in plan.modules.items() if m.startswith(name + ".") and s.style in (COLWISE, ROWWISE)]
        assert bool(cut_modules) == (name in plan.attentions)
        if not cut_modules:
            continue
        heads, size = plan.heads[plan.attentions[name].heads], attention.head_dim
        assert plan.attentions[name].head_dim == size
        ratio = attention.heads // attention.kv_heads
        at_k, at_v = attention.heads * size, (attention.heads + attention.kv_heads) * size
        for rank in range(ranks):
            query, kv = held(heads.query, rank), held(heads.kv, rank)
            assert [kv[i // heads.groups[rank]] for i in range(len(query))] == [h // ratio for h in query]
            rows = {
                "query": [h * size + i for h in query for i in range(size)],
                "kv": [h * size + i for h in kv for i in range(size)],
                "per head": [h * 3 * size + i for h in query for i in range(3 * size)],
            }
            rows["packed"] = rows["query"] + [at_k + r for r in rows["kv"]] + [at_v + r for r in rows["kv"]]
            for module in cut_modules:
                assert held(partition_of(plan, module), rank) == rows[HOLDS[module.rpartition(".")[2]]], module


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("ranks", WIDTHS)
@pytest.mark.parametrize("case", sorted(MODELS))
def test_every_model_at_every_width(make, case, ranks, layout):
    description = make(case)
    plan = rewrite(description, ranks, layout)
    assert_sound(description, plan, ranks, layout)
    assert_heads(description, plan, ranks)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("ranks", WIDTHS)
@pytest.mark.parametrize("width", [704, 352, 96, 100])
@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_every_intermediate_size(make, case, width, ranks, layout):
    description = make(case, intermediate_size=width)
    plan = rewrite(description, ranks, layout)
    steps = {"nf4": [s for s in (64, 32) if width % s == 0], "int8": [16, 1], "plain": [16, 1], "blocks": [128]}[layout]
    packed = case == "phi3"
    fits = [s for s in steps if math.ceil(width / s) >= ranks and (width % s == 0 or not packed)]
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        if not fits:
            assert f"{mlp}.down_proj" in plan.replicated
            assert f"{mlp}.down_proj" not in plan.modules
            continue
        down = partition_of(plan, f"{mlp}.down_proj")
        alignments = [math.ceil(n / fits[0]) for n in down.lengths]
        assert down.legal(fits[0])
        assert max(alignments) - min(alignments) <= 1
        for rank in range(ranks):
            mine = held(down, rank)
            if packed:
                assert held(partition_of(plan, f"{mlp}.gate_up_proj"), rank) == mine + [width + e for e in mine]
            else:
                assert plan.modules[f"{mlp}.gate_proj"] == plan.modules[f"{mlp}.up_proj"]
                assert held(partition_of(plan, f"{mlp}.gate_proj"), rank) == mine


@pytest.mark.parametrize(
    ("width", "ranks", "expected"),
    [
        (704, 2, [384, 320]),
        (704, 3, [256, 256, 192]),
        (704, 8, [128, 128, 128, 64, 64, 64, 64, 64]),
        (352, 2, [192, 160]),
        (352, 4, [96, 96, 96, 64]),
        (96, 3, [32, 32, 32]),
    ],
)
def test_nf4_widths_by_hand(make, width, ranks, expected):
    plan = rewrite(make("llama", intermediate_size=width), ranks)
    assert lengths(plan, "model.layers.0.mlp.down_proj") == expected


@pytest.mark.parametrize(
    ("width", "ranks", "reason"),
    [
        (96, 4, "96 features are 3 multiples of 32, fewer than 4 ranks"),
        (352, 12, "352 features are 11 multiples of 32, fewer than 12 ranks"),
        (100, 2, "model.layers.*.mlp.down_proj has 100 inputs, which its quantization blocks do not divide"),
    ],
)
def test_widths_that_cannot_be_cut_are_told(make, width, ranks, reason):
    plan = rewrite(make("llama", intermediate_size=width), ranks)
    for part, asked in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise")):
        assert told(plan, f"mlp.{part}") == [(asked, "replicate", reason, 2)]
        assert plan.replicated[f"model.layers.1.mlp.{part}"] == reason
        assert f"model.layers.1.mlp.{part}" not in plan.modules
