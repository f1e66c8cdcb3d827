"""The record of every rule: what was asked, what it became and why, also of rules that cannot be followed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from parallel_plans import lengths, rewrite, told

from distquant.planning.tensor_parallel import VOCAB_EMBEDDING


def test_rules_tell_what_was_asked_what_became_and_why(make):
    description = make("llama")
    plan = rewrite(description, 2)
    why = "whole kv heads; query heads 4+4, kv heads 1+1"
    alignments = "multiples of 64 for gate_proj, up_proj, down_proj"
    assert told(plan, "self_attn.q_proj") == [("colwise", "colwise 128+128", why, 2)]
    assert told(plan, "self_attn.k_proj") == [("colwise", "colwise 32+32", why, 2)]
    assert told(plan, "self_attn.o_proj") == [("rowwise", "rowwise 128+128", why, 2)]
    assert told(plan, "mlp.gate_proj") == [("colwise", "colwise 384+320", alignments, 2)]
    assert told(plan, "mlp.down_proj") == [("rowwise", "rowwise 384+320", alignments, 2)]
    vocabulary = "over the vocabulary, multiples of 16"
    assert told(plan, "lm_head") == [("colwise_gather_output", "colwise_gather 160+160", vocabulary, 1)]
    asked = description.tp_plan.get("model.embed_tokens", "no rule")  # since transformers 5.23 it has one
    assert told(plan, "embed_tokens") == [(asked, "vocab_embedding 160+160", vocabulary, 1)]
    assert plan.modules["model.embed_tokens"].style == VOCAB_EMBEDDING
    assert len(plan.rules) == 9


def test_many_ranks_are_told_as_a_range(make):
    plan = rewrite(make("llama"), 8)
    assert told(plan, "mlp.down_proj")[0][1] == "rowwise 8 x 64 to 128"
    assert told(plan, "self_attn.q_proj")[0][1] == "colwise 8 x 32"


def test_unused_patterns_are_reported(make):
    description = make("llama")
    plan = rewrite(description, 2, tp_plan={**description.tp_plan, "model.layers.*.mlp.up_porj": "colwise"})
    assert told(plan, "mlp.up_porj")[0][:3] == ("colwise", "unused", "no module of this model matches")
    assert [rule.pattern for rule in plan.rules if rule.became == "unused"] == ["model.layers.*.mlp.up_porj"]


def test_a_rule_for_one_layer_wins_nothing_for_the_others(make):
    description = make("llama")
    asked = {f"model.layers.1.mlp.{p}": s for p, s in (("gate_proj", "colwise"), ("down_proj", "rowwise"))}
    plan = rewrite(description, 2, tp_plan=asked)
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
    description = make("llama")
    plan = rewrite(description, 2, tp_plan={**description.tp_plan, **change})
    for name in ("gate_proj", "up_proj", "down_proj"):
        ((_, became, why, _),) = told(plan, f"mlp.{name}")
        assert became == "replicate"
        assert reason in why
    assert "model.layers.0.self_attn.q_proj" in plan.modules


def test_column_without_its_row_is_replicated(make):
    description = make("llama")
    asked = {k: v for k, v in description.tp_plan.items() if not k.endswith("down_proj")}
    plan = rewrite(description, 2, tp_plan=asked)
    ((_, became, why, _),) = told(plan, "mlp.gate_proj")
    assert became == "replicate"
    assert "no partner with the same features" in why
    assert "model.layers.0.mlp.gate_proj" not in plan.modules


ORDER = """
from distquant.planning.tensor_parallel import rewrite_tp_plan
from distquant.model.description import ModelDescription
none = dict(params={}, tied={}, sources={}, unexpected=(), missing=(), linears={}, attentions={}, embeddings=())
none |= dict(input_embedding=None, output_embedding=None, experts={}, tp_plan={}, ep_plan={}, default_skip=())
description = ModelDescription(model_type="m", architecture="M", **none)
asked = {f"model.{name}": "colwise" for name in "abcdefgh"}
print([rule.pattern for rule in rewrite_tp_plan(description, asked, 2, None).rules])
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
