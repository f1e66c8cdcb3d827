"""Arithmetic: a sharded model computes what the whole one does, within float32 rounding (int8: its method's own error).

ROUNDING: a float32 sum of n terms in another order moves by about sqrt(n) * 6e-8 of its size; with n <= 352 that is
1e-6 a layer, and normalization, softmax and two layers stay within an order of magnitude of it. Forgetting one bias, or
taking one absmax of a wrong block, moves the logits by 1e-2 and more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import work
from models import FAMILIES, LATER
from transformers import CONFIG_MAPPING, AutoTokenizer
from upstream import their_model

import distquant as dq
from distquant.kernels import reference

ROUNDING = 2e-5
INT8_ERROR = 2e-2

STRADDLING = ("llama-96", "llama-352")
"""Families whose rows are no multiple of a block: upstream's own CPU kernel takes wrong absmax there."""


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def whole_logits(model_of):
    known = {}

    def logits(family: str, name: str) -> torch.Tensor:
        if (family, name) not in known:
            known[family, name] = work.logits(model_of(family), name)
        return known[family, name]

    return logits


CASES = [
    *((family, name, width) for family in FAMILIES for name in ("none", "nf4") for width in (2, 3)),
    *((family, "none", 4) for family in FAMILIES),
    *((family, name, width) for family in STRADDLING for name, width in (("nf4", 4), ("fp4", 2))),
]
"""Every family's cuts at every width; 4-bit kernels of four ranks, and fp4's, where blocks straddle rows."""


@pytest.mark.parametrize(("family", "name", "width"), CASES)
def test_logits_equal_those_of_one_rank(ranks, model_of, whole_logits, family, name, width):
    found = ranks.run(width, work.logits, model_of(family), name, f"tp={width}")
    assert all(torch.equal(one, found[0]) for one in found)
    assert distance(found[0], whole_logits(family, name)) < ROUNDING


@pytest.mark.parametrize(("family", "width"), [*((family, 2) for family in LATER), ("codegen", 3)])
def test_logits_under_plans_of_later_versions(ranks, model_of, whole_logits, family, width):
    """With a version without such rules the layers are replicated and logits equal; without any plan it is refused."""
    if LATER[family][0] not in CONFIG_MAPPING:
        pytest.skip(f"{family} comes with a later transformers")
    if family in ("gptj", "codegen") and CONFIG_MAPPING[LATER[family][0]].base_model_tp_plan is None:
        with pytest.raises(dq.InputError, match="has no tensor-parallel plan"):
            dq.plan(model_of(family), mesh=f"tp={width}")
        return
    for name in ("none", "nf4"):
        found = ranks.run(width, work.logits, model_of(family), name, f"tp={width}")
        assert all(torch.equal(one, found[0]) for one in found)
        assert distance(found[0], whole_logits(family, name)) < ROUNDING


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_logits_stay_within_the_error_of_the_method(ranks, model_of, whole_logits, family):
    found = ranks.run(2, work.logits, model_of(family), "int8", "tp=2")
    whole = whole_logits(family, "int8")
    assert torch.equal(found[0], found[1])
    assert (found[0] - whole).norm() / whole.norm() < INT8_ERROR


@pytest.mark.parametrize("name", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in STRADDLING])
def test_one_rank_computes_what_transformers_does(model_of, whole_logits, family, name):
    theirs = their_model(model_of(family), name, dtype=torch.float32)
    with torch.no_grad():
        assert distance(theirs(torch.tensor(work.IDS)).logits, whole_logits(family, name)) < ROUNDING


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("family", STRADDLING)
def test_straddling_blocks_follow_the_flat_definition(model_of, whole_logits, family, name):
    """Where blocks straddle rows upstream is no truth, so weights are put through the definition one by one."""
    truth = their_model(model_of(family), dtype=torch.float32)
    ours = work.exact(model_of(family), name)
    for path in ours.distquant.plan.converted:
        weight = truth.get_submodule(path).weight.data
        codes, absmax = reference.quantize_4bit(weight, 64, name)
        weight.copy_(reference.dequantize_4bit(codes, absmax, 64, name, tuple(weight.shape)))
    ids = torch.tensor(work.IDS)
    embedded = [m.get_input_embeddings()(ids).detach().requires_grad_() for m in (ours, truth)]
    results = [m(inputs_embeds=e).logits for m, e in zip((ours, truth), embedded, strict=True)]
    for logits in results:
        logits.square().sum().backward()
    assert distance(results[0].detach(), results[1].detach()) < ROUNDING
    assert distance(embedded[0].grad, embedded[1].grad) < ROUNDING
    assert distance(whole_logits(family, name), results[1].detach()) < ROUNDING


@pytest.mark.parametrize("width", [3])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_config_is_not_changed(ranks, model_of, family, width):
    whole = work.config_after_load(model_of(family))
    assert ranks.run(width, work.config_after_load, model_of(family), f"tp={width}") == [whole] * width


@pytest.mark.parametrize("width", [3, 4])
def test_uneven_vocabulary_is_gathered_whole(ranks, model_of, whole_logits, width):
    """130 rows over 3 and 4 ranks, embedding and head tied."""
    found = ranks.run(width, work.logits_and_vocabulary, model_of("llama-tied"), "none", f"tp={width}")
    lengths = [length for _, length in found]
    assert sum(lengths) == 130
    assert len(set(lengths)) > 1
    for logits, _ in found:
        assert logits.shape[-1] == 130
        assert distance(logits, whole_logits("llama-tied", "none")) < ROUNDING


def test_perplexity_of_a_trained_model_to_six_digits(ranks, kjv_llama):
    text = (Path(kjv_llama) / "validation.txt").read_text()[:20000]
    sharded = ranks.run(2, work.perplexity, kjv_llama, "nf4-dq", text, "tp=2")
    whole = work.perplexity(kjv_llama, "nf4-dq", text)
    theirs = their_model(kjv_llama, "nf4-dq", dtype=torch.float32)
    truth = dq.perplexity(theirs, AutoTokenizer.from_pretrained(kjv_llama), text)
    assert whole == pytest.approx(truth, rel=1e-6)
    assert sharded == [pytest.approx(truth, rel=1e-6)] * 2
