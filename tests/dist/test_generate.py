"""`generate`: all ranks agree, greedy equals one rank's, and it leaves no trace in the weights."""

from __future__ import annotations

import pytest
import work

GREEDY = {"do_sample": False}
STATIC = {"do_sample": False, "cache_implementation": "static"}

FAMILIES = ("llama-gqa", "qwen2-biases", "llama-tied", "phi3-packed", "llama-96", "neox-per-head", "gemma2")


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answer_is_that_of_one_rank(ranks, model_of, family, width):
    """At tp=3 and tp=4 the two kv heads of most families are repeated."""
    path = model_of(family)
    whole = work.tokens(path, "nf4", None, **GREEDY)
    found = ranks.run(width, work.tokens_with, path, "nf4", f"tp={width}", None, GREEDY)
    assert found == [whole] * width


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("family", ["llama-gqa", "phi3-packed", "neox-per-head", "gemma2"])
def test_static_cache_fits_the_heads_of_every_rank(ranks, model_of, family, width):
    path = model_of(family)
    whole = work.tokens(path, "nf4", None, **STATIC)
    found = ranks.run(width, work.tokens_with, path, "nf4", f"tp={width}", None, STATIC)
    assert found == [whole] * width


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("name", ["none", "int8"])
def test_other_schemes_agree_over_ranks(ranks, model_of, name, width):
    found = ranks.run(width, work.tokens_with, model_of("llama-gqa"), name, f"tp={width}", None, GREEDY)
    assert found == [found[0]] * width


@pytest.mark.parametrize("mesh", ["tp=2", "tp=3", "dp=2,tp=2"])
def test_ranks_seeded_differently_sample_the_same(ranks, model_of, mesh):
    """Ranks of one replica must agree; replicas (dp) draw their own."""
    path, sampling = model_of("llama-gqa"), {"do_sample": True, "temperature": 2.0, "top_k": 0}
    world = 4 if "dp" in mesh else int(mesh[-1])
    found = ranks.run(world, work.tokens_with, path, "nf4", mesh, 100, sampling)
    replicas = [found[:2], found[2:]] if "dp" in mesh else [found]
    for replica in replicas:
        assert replica == [replica[0]] * len(replica)
    other = ranks.run(world, work.tokens_with, path, "nf4", mesh, 200, sampling)
    assert other != found


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-352", "neox-per-head"])
def test_generate_leaves_weights_as_they_were(ranks, model_of, family, quant, static):
    for before, after, changed in ranks.run(2, work.traces_of_generate, model_of(family), quant, "tp=2", static):
        assert before == after
        assert changed == []


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-dq", "fp4-dq", "int8"])
def test_generate_leaves_weights_of_one_rank_as_they_were(model_of, quant):
    before, after, changed = work.traces_of_generate(model_of("llama-gqa"), quant, None, False)
    assert before == after
    assert changed == []
