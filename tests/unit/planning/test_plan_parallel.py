"""Rewritten tensor-parallel plans of real models: exact cuts, heads that fit, and a record of every rule."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import transformers
from test_plan_cuts import assert_owned_partitions, held

from distquant.errors import Problems
from distquant.layout import ALL, PLAIN_STEPS, Component, Layout, plain
from distquant.planning.parallel import (
    COLWISE,
    COLWISE_GATHER,
    GRAD_REDUCE,
    ROWWISE,
    ROWWISE_SPLIT,
    VOCAB_EMBEDDING,
    ParallelPlan,
    rewrite_tp_plan,
)
from distquant.skeleton import Skeleton, build, build_skeleton
from distquant.skeleton.words import wildcard

HEADS, KV, DIM = 8, 2, 32
SMALL = {
    "hidden_size": HEADS * DIM,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NF4 = Layout(
    (
        Component(name="", dtype="uint8", flat=2),
        Component(name="absmax", dtype="float32", flat=64, cuts=(64, 32)),
        Component(name="nested_absmax", dtype="float32", flat=64 * 256, gathered=True),
    )
)
SCB = Component(name="SCB", dtype="float32", spans=(1, ALL), cuts=PLAIN_STEPS)
INT8 = Layout((Component(name="", dtype="int8", cuts=PLAIN_STEPS), SCB))
BLOCKS = Layout((Component(name="", dtype="float8_e4m3fn"), Component(name="scale", dtype="float32", spans=(128, 128))))
LAYOUTS = {"nf4": NF4, "int8": INT8, "blocks": BLOCKS, "plain": plain("bfloat16")}

MODELS = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": DIM}),
    "phi3": ("Phi3", {}),
    "phi3_mha": ("Phi3", {"num_key_value_heads": HEADS}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": HEADS}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}
WIDTHS = [2, 3, 4, 8]
_built: dict[tuple, Skeleton] = {}


@pytest.fixture
def make(tmp_path_factory):
    """A skeleton by the name of its model, built once per configuration."""

    def skeleton(case: str, **more) -> Skeleton:
        key = (case, *sorted(more.items()))
        if key not in _built:
            folder: Path = tmp_path_factory.mktemp(case)
            name, own = MODELS[case]
            getattr(transformers, f"{name}Config")(**{**SMALL, **own, **more}).save_pretrained(folder)
            model = build(folder, "bfloat16")
            shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
            if own.get("tie_word_embeddings"):
                del shapes["lm_head.weight"]
            problems = Problems()
            _built[key] = build_skeleton(model, shapes, {}, problems)
            assert not problems
        return _built[key]

    return skeleton


def layout_of(skeleton: Skeleton, layout: str):
    return lambda name: plain("bfloat16") if name == skeleton.output_embedding else LAYOUTS[layout]


def rewrite(skeleton: Skeleton, ranks: int, layout: str = "nf4", tp_plan: dict[str, str] | None = None) -> ParallelPlan:
    return rewrite_tp_plan(skeleton, tp_plan or skeleton.tp_plan, ranks, layout_of(skeleton, layout))


def told(plan: ParallelPlan, pattern: str) -> list[tuple[str, str, str, int]]:
    return [(r.asked, r.became, r.reason, r.modules) for r in plan.rules if r.pattern.endswith(pattern)]


def cut_of(plan: ParallelPlan, module: str):
    return plan.cuts[plan.modules[module].cut]


def lengths(plan: ParallelPlan, module: str) -> list[int]:
    return cut_of(plan, module).lengths


def assert_sound(skeleton: Skeleton, plan: ParallelPlan, ranks: int, layout: str) -> None:
    """What holds for every model: sizes, coverage, units, no empty shard, one story per rule."""
    checked = set()
    for name, shard in plan.modules.items():
        if shard.style == GRAD_REDUCE:
            continue
        cut = plan.cuts[shard.cut]
        if shard.style == VOCAB_EMBEDDING:
            size, units = skeleton.params[f"{name}.weight"].shape[0], PLAIN_STEPS
        else:
            linear = skeleton.linears[name]
            dim = {COLWISE: 0, COLWISE_GATHER: 0, ROWWISE: 1, ROWWISE_SPLIT: 1}[shard.style]
            shape = (linear.out_features, linear.in_features)
            size, units = shape[dim], layout_of(skeleton, layout)(name).units(shape, dim)
        assert cut.size == size, name
        assert len(cut.parts) == ranks
        assert min(cut.lengths) > 0, name
        assert any(cut.legal(unit) for unit in units), f"{name}: {cut} is off its units {units}"
        if shard.cut not in checked:
            assert_owned_partitions(cut)
            checked.add(shard.cut)
        if shard.style != COLWISE:
            assert cut.repeated == 0, name
    assert not set(plan.modules) & set(plan.replicated)
    assert all(plan.replicated.values())
    expected = Counter(wildcard(n) for n in (*skeleton.modules, *skeleton.params) if wildcard(n) in skeleton.tp_plan)
    stories = Counter(rule.pattern for rule in plan.rules)
    assert set(stories.values()) == {1}, "a rule is told twice"
    for rule in plan.rules:
        assert rule.reason
        assert rule.asked == skeleton.tp_plan.get(rule.pattern, "no rule")
        assert rule.modules == expected.get(rule.pattern, 1)
    assert set(skeleton.tp_plan) <= set(stories)


HOLDS = {
    "q_proj": "query",
    "k_proj": "kv",
    "v_proj": "kv",
    "o_proj": "query",
    "dense": "query",
    "qkv_proj": "packed",
    "query_key_value": "per head",
}


def assert_heads(skeleton: Skeleton, plan: ParallelPlan, ranks: int) -> None:
    """Follows rows of q, k, v to heads: every local query head meets its own kv head, and o takes the same heads."""
    for name, attention in skeleton.attentions.items():
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
                assert held(cut_of(plan, module), rank) == rows[HOLDS[module.rpartition(".")[2]]], module


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("ranks", WIDTHS)
@pytest.mark.parametrize("case", sorted(MODELS))
def test_every_model_at_every_width(make, case, ranks, layout):
    skeleton = make(case)
    plan = rewrite(skeleton, ranks, layout)
    assert_sound(skeleton, plan, ranks, layout)
    assert_heads(skeleton, plan, ranks)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("ranks", WIDTHS)
@pytest.mark.parametrize("width", [704, 352, 96, 100])
@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_every_intermediate_size(make, case, width, ranks, layout):
    skeleton = make(case, intermediate_size=width)
    plan = rewrite(skeleton, ranks, layout)
    steps = {"nf4": [s for s in (64, 32) if width % s == 0], "int8": [16, 1], "plain": [16, 1], "blocks": [128]}[layout]
    packed = case == "phi3"
    fits = [s for s in steps if math.ceil(width / s) >= ranks and (width % s == 0 or not packed)]
    for layer in range(2):
        mlp = f"model.layers.{layer}.mlp"
        if not fits:
            assert f"{mlp}.down_proj" in plan.replicated
            assert f"{mlp}.down_proj" not in plan.modules
            continue
        down = cut_of(plan, f"{mlp}.down_proj")
        units = [math.ceil(n / fits[0]) for n in down.lengths]
        assert down.legal(fits[0])
        assert max(units) - min(units) <= 1
        for rank in range(ranks):
            mine = held(down, rank)
            if packed:
                assert held(cut_of(plan, f"{mlp}.gate_up_proj"), rank) == mine + [width + e for e in mine]
            else:
                assert plan.modules[f"{mlp}.gate_proj"] == plan.modules[f"{mlp}.up_proj"]
                assert held(cut_of(plan, f"{mlp}.gate_proj"), rank) == mine


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
        (96, 4, "96 features are 3 units of 32, fewer than 4 ranks"),
        (352, 12, "352 features are 11 units of 32, fewer than 12 ranks"),
        (100, 2, "model.layers.*.mlp.down_proj has 100 inputs, which its quantization blocks do not divide"),
    ],
)
def test_widths_that_cannot_be_cut_are_told(make, width, ranks, reason):
    plan = rewrite(make("llama", intermediate_size=width), ranks)
    for part, asked in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise")):
        assert told(plan, f"mlp.{part}") == [(asked, "replicate", reason, 2)]
        assert plan.replicated[f"model.layers.1.mlp.{part}"] == reason
        assert f"model.layers.1.mlp.{part}" not in plan.modules


def test_rules_tell_what_was_asked_what_became_and_why(make):
    plan = rewrite(make("llama"), 2)
    why = "whole kv heads; query heads 4+4, kv heads 1+1"
    units = "units of 64 for gate_proj, up_proj, down_proj"
    assert told(plan, "self_attn.q_proj") == [("colwise", "colwise 128+128", why, 2)]
    assert told(plan, "self_attn.k_proj") == [("colwise", "colwise 32+32", why, 2)]
    assert told(plan, "self_attn.o_proj") == [("rowwise", "rowwise 128+128", why, 2)]
    assert told(plan, "mlp.gate_proj") == [("colwise", "colwise 384+320", units, 2)]
    assert told(plan, "mlp.down_proj") == [("rowwise", "rowwise 384+320", units, 2)]
    vocabulary = "over the vocabulary, units of 16"
    assert told(plan, "lm_head") == [("colwise_gather_output", "colwise_gather 160+160", vocabulary, 1)]
    assert told(plan, "embed_tokens") == [("embedding_rowwise", "vocab_embedding 160+160", vocabulary, 1)]
    assert plan.modules["model.embed_tokens"].style == VOCAB_EMBEDDING
    assert len(plan.rules) == 9


def test_many_ranks_are_told_as_a_range(make):
    plan = rewrite(make("llama"), 8)
    assert told(plan, "mlp.down_proj")[0][1] == "rowwise 8 x 64 to 128"
    assert told(plan, "self_attn.q_proj")[0][1] == "colwise 8 x 32"


def test_kv_heads_are_repeated_at_tp_4(make):
    plan = rewrite(make("llama"), 4)
    heads = plan.heads[plan.attentions["model.layers.0.self_attn"].heads]
    assert [held(heads.kv, rank) for rank in range(4)] == [[0], [0], [1], [1]]
    assert heads.groups == (2, 2, 2, 2)
    assert cut_of(plan, "model.layers.0.self_attn.v_proj").parts == (((0, 32),), ((0, 32),), ((32, 64),), ((32, 64),))
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
    assert cut_of(plan, "model.layers.0.self_attn.o_proj").legal(64)


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
    skeleton = make("llama", hidden_size=64)
    why = "no cut of 8 heads of 8 over 3 ranks falls on units of 32"
    assert told(rewrite(skeleton, 3), "self_attn.o_proj") == [("rowwise", "replicate", why, 2)]
    assert rewrite(skeleton, 3, "int8").attentions != {}


def test_heads_are_grouped_until_they_fall_on_blocks(make):
    """Heads of 16 in blocks of 32 go out in pairs."""
    plan = rewrite(make("llama", hidden_size=128, num_key_value_heads=8), 3)
    heads = plan.heads[plan.attentions["model.layers.0.self_attn"].heads]
    assert heads.query.lengths == [4, 2, 2]


def test_qwen2_biases_change_nothing(make):
    qwen, llama = rewrite(make("qwen2"), 3), rewrite(make("llama"), 3)
    assert (qwen.modules, qwen.cuts, qwen.heads) == (llama.modules, llama.cuts, llama.heads)
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
    qkv = cut_of(plan, "model.layers.0.self_attn.qkv_proj")
    assert qkv.parts == (
        ((0, q // 2), (q, q + k // 2), (q + k, q + k + k // 2)),
        ((q // 2, q), (q + k // 2, q + k), (q + k + k // 2, q + 2 * k)),
    )
    gate_up = cut_of(plan, "model.layers.0.mlp.gate_up_proj")
    assert gate_up.parts == (((0, 384), (704, 1088)), ((384, 704), (1088, 1408)))
    assert plan.modules["model.layers.0.self_attn.qkv_proj"].style == COLWISE
    assert plan.modules["model.layers.0.mlp.down_proj"].style == ROWWISE
    units = "units of 64 for gate_up_proj, down_proj"
    assert told(plan, "gate_up_proj") == [("colwise_gather_output", "colwise 768+640", units, 2)]


def test_gpt_neox_keeps_each_heads_qkv_together(make):
    plan = rewrite(make("gpt_neox"), 3, "int8")
    qkv = cut_of(plan, "gpt_neox.layers.0.attention.query_key_value")
    assert qkv.parts == (((0, 288),), ((288, 576),), ((576, 768),))
    assert lengths(plan, "gpt_neox.layers.0.attention.dense") == [96, 96, 64]
    assert told(plan, "embed_in")[0][:2] == ("no rule", "vocab_embedding 112+112+96")
    assert lengths(plan, "gpt_neox.layers.1.mlp.dense_4h_to_h") == [240, 240, 224]


def test_olmo2_gathers_q_and_k_for_their_norms(make):
    plan = rewrite(make("olmo2"), 2)
    assert plan.attentions == {}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert plan.modules[f"model.layers.0.self_attn.{name}"].style == COLWISE_GATHER
    assert plan.modules["model.layers.0.self_attn.o_proj"].style == ROWWISE_SPLIT
    assert lengths(plan, "model.layers.0.self_attn.o_proj") == [128, 128]
    assert told(plan, "o_proj") == [("rowwise_split_input", "rowwise_split 128+128", "on its own, units of 64", 2)]


def test_olmo2_where_one_member_cannot_be_cut_is_replicated_as_a_whole(make):
    """o_proj has 2 blocks for 3 ranks: no member of the group keeps a cut, and each rule has one story."""
    skeleton = make("olmo2", hidden_size=64)
    plan = rewrite(skeleton, 3)
    attention = [n for n in skeleton.linears if ".self_attn." in n]
    assert len(attention) == 8
    assert set(attention) <= set(plan.replicated)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert [became for _, became, _, _ in told(plan, f"self_attn.{name}")] == ["replicate"]
    assert not set(attention) & set(plan.modules)
    assert set(plan.cuts) == {shard.cut for shard in plan.modules.values() if shard.cut}


def test_mixtral_keeps_experts_whole_and_says_so(make):
    plan = rewrite(make("mixtral"), 2)
    asked = make("mixtral").tp_plan
    patterns = [pattern for pattern in asked if ".experts" in pattern]
    assert len(patterns) == 3
    for pattern in patterns:
        why = "experts are kept whole on every rank of tp"
        assert told(plan, pattern) == [(asked[pattern], "replicate", why, 2)]
    assert not any("experts" in name for name in plan.modules)
    assert lengths(plan, "model.layers.0.self_attn.q_proj") == [128, 128]


@pytest.mark.parametrize("layout", ["nf4", "blocks"])
@pytest.mark.parametrize("ranks", [2, 3, 7, 8, 20])
def test_tied_embedding_and_head_share_one_cut(make, ranks, layout):
    plan = rewrite(make("llama_tied"), ranks, layout)
    assert plan.modules["lm_head"].cut == plan.modules["model.embed_tokens"].cut
    assert sum(lengths(plan, "lm_head")) == 320
    assert "embedding and head are tied: one cut" in told(plan, "embed_tokens")[0][2]


def test_tied_embedding_and_head_share_one_fate_where_the_head_is_quantized(make):
    """Blocks of 128 rows give the head 3 units: for 4 ranks it stays whole, and so must the embedding."""
    skeleton = make("llama_tied")
    plan = rewrite_tp_plan(skeleton, skeleton.tp_plan, 4, lambda name: BLOCKS)
    assert ("lm_head" in plan.modules) == ("model.embed_tokens" in plan.modules)


def test_vocabulary_without_a_rule_is_cut_too(make):
    skeleton = make("llama")
    asked = {k: v for k, v in skeleton.tp_plan.items() if k not in ("lm_head", "model.embed_tokens")}
    plan = rewrite(skeleton, 2, tp_plan=asked)
    assert told(plan, "lm_head") == [("no rule", "colwise_gather 160+160", "over the vocabulary, units of 16", 1)]
    assert lengths(plan, "model.embed_tokens") == [160, 160]


def test_small_vocabulary_is_cut_finely_or_kept(make):
    skeleton = make("llama", vocab_size=10)
    assert lengths(rewrite(skeleton, 3), "lm_head") == [4, 3, 3]
    plan = rewrite(skeleton, 11)
    assert not {"lm_head", "model.embed_tokens"} & set(plan.modules)
    assert told(plan, "lm_head") == [("colwise_gather_output", "replicate", "fewer units than ranks", 1)]
    assert told(plan, "embed_tokens") == [("embedding_rowwise", "replicate", "fewer units than ranks", 1)]


def test_unused_patterns_are_reported(make):
    skeleton = make("llama")
    plan = rewrite(skeleton, 2, tp_plan={**skeleton.tp_plan, "model.layers.*.mlp.up_porj": "colwise"})
    assert told(plan, "mlp.up_porj")[0][:3] == ("colwise", "unused", "no module of this model matches")
    assert [rule.pattern for rule in plan.rules if rule.became == "unused"] == ["model.layers.*.mlp.up_porj"]


def test_a_rule_for_one_layer_wins_nothing_for_the_others(make):
    skeleton = make("llama")
    asked = {f"model.layers.1.mlp.{p}": s for p, s in (("gate_proj", "colwise"), ("down_proj", "rowwise"))}
    plan = rewrite(skeleton, 2, tp_plan=asked)
    assert lengths(plan, "model.layers.1.mlp.down_proj") == [384, 320]
    assert "model.layers.0.mlp.down_proj" not in plan.modules
    assert not [rule for rule in plan.rules if rule.became == "unused"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.layers.*.mlp.up_proj": "sequence_parallel"}, "has a style 'sequence_parallel' that has no exact"),
        ({"model.layers.*.mlp.act_fn": "colwise"}, "mlp.act_fn has a module for style 'colwise'"),
    ],
)
def test_unknown_styles_replicate_their_group_and_are_told(make, change, reason):
    skeleton = make("llama")
    plan = rewrite(skeleton, 2, tp_plan={**skeleton.tp_plan, **change})
    for name in ("gate_proj", "up_proj", "down_proj"):
        ((_, became, why, _),) = told(plan, f"mlp.{name}")
        assert became == "replicate"
        assert reason in why
    assert "model.layers.0.self_attn.q_proj" in plan.modules


def test_column_without_its_row_is_replicated(make):
    skeleton = make("llama")
    asked = {k: v for k, v in skeleton.tp_plan.items() if not k.endswith("down_proj")}
    plan = rewrite(skeleton, 2, tp_plan=asked)
    ((_, became, why, _),) = told(plan, "mlp.gate_proj")
    assert became == "replicate"
    assert "no partner with the same features" in why
    assert "model.layers.0.mlp.gate_proj" not in plan.modules


ORDER = """
from distquant.planning.parallel import rewrite_tp_plan
from distquant.skeleton.words import Skeleton
none = dict(params={}, tied={}, sources={}, unexpected=(), missing=(), linears={}, attentions={}, embeddings=())
none |= dict(input_embedding=None, output_embedding=None, experts=(), tp_plan={}, ep_plan={}, default_skip=())
skeleton = Skeleton(model_type="m", architecture="M", **none)
asked = {f"model.{name}": "colwise" for name in "abcdefgh"}
print([rule.pattern for rule in rewrite_tp_plan(skeleton, asked, 2, None).rules])
"""


def test_rules_come_in_one_order_whatever_the_hash_seed():
    """The digest of a plan covers its rules, so their order must not depend on the process."""
    root = str(Path(__file__).parents[3])
    found = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": root}
        done = subprocess.run([sys.executable, "-c", ORDER], env=env, capture_output=True, text=True, check=True)
        assert "model.h" in done.stdout
        found.add(done.stdout)
    assert len(found) == 1
