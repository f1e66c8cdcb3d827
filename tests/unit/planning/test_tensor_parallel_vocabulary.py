"""Embedding and head in rewritten plans: cut over the vocabulary, alike where they are tied."""

from __future__ import annotations

import pytest
from parallel_plans import BLOCKS, lengths, rewrite, told

from distquant.planning.tensor_parallel import rewrite_tp_plan


@pytest.mark.parametrize("layout", ["nf4", "blocks"])
@pytest.mark.parametrize("ranks", [2, 3, 7, 8, 20])
def test_tied_embedding_and_head_share_one_cut(make, ranks, layout):
    plan = rewrite(make("llama_tied"), ranks, layout)
    assert plan.modules["lm_head"].partition == plan.modules["model.embed_tokens"].partition
    assert sum(lengths(plan, "lm_head")) == 320
    assert "embedding and head are tied: one partition" in told(plan, "embed_tokens")[0][2]


def test_tied_embedding_and_head_share_one_fate_where_the_head_is_quantized(make):
    """Blocks of 128 rows give the head 3 units: for 4 ranks it stays whole, and so must the embedding."""
    description = make("llama_tied")
    plan = rewrite_tp_plan(description, description.tp_plan, 4, lambda name: BLOCKS)
    assert ("lm_head" in plan.modules) == ("model.embed_tokens" in plan.modules)


def test_vocabulary_without_a_rule_is_cut_too(make):
    description = make("llama")
    asked = {k: v for k, v in description.tp_plan.items() if k not in ("lm_head", "model.embed_tokens")}
    plan = rewrite(description, 2, tp_plan=asked)
    assert told(plan, "lm_head") == [("no rule", "colwise_gather 160+160", "over the vocabulary, multiples of 16", 1)]
    assert lengths(plan, "model.embed_tokens") == [160, 160]


def test_small_vocabulary_is_cut_finely_or_kept(make):
    description = make("llama", vocab_size=10)
    assert lengths(rewrite(description, 3), "lm_head") == [4, 3, 3]
    plan = rewrite(description, 11)
    assert not {"lm_head", "model.embed_tokens"} & set(plan.modules)
    reason = "fewer multiples of the alignment than ranks"
    assert told(plan, "lm_head") == [("colwise_gather_output", "replicate", reason, 1)]
    asked = description.tp_plan.get("model.embed_tokens", "no rule")  # since transformers 5.23 it has one
    assert told(plan, "embed_tokens") == [(asked, "replicate", reason, 1)]
