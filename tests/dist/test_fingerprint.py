"""The same bits at every width: one fingerprint for 1, 2, 3 and 4 ranks, replicas, and any number of threads."""

from __future__ import annotations

import pytest
import torch
import work
from models import FAMILIES
from safetensors.torch import load_file, save_file

import distquant as dq


FP4 = ("llama-gqa", "llama-352", "llama-96")
"""Families of fp4-dq, which differs from nf4-dq in its 16 values only: whole blocks, a moved cut, straddling blocks."""
CASES = [(family, quant) for family in FAMILIES for quant in work.SCHEMES if quant != "fp4-dq" or family in FP4]


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_fingerprint_is_the_same_at_every_width(ranks, model_of, family, quant):
    path = model_of(family)
    whole = work.fingerprint(path, quant)
    for width in (2, 3, 4):
        assert ranks.run(width, work.fingerprint, path, quant, f"tp={width}") == [whole] * width


@pytest.mark.parametrize("other", [("llama-gqa", "bfloat16"), ("qwen2-biases", "float16")])
def test_rank_0_decides_what_is_loaded(ranks, model_of, other):
    """The other ranks build their model while it plans; what they built is not used where it is not what it planned."""
    path = model_of("llama-gqa")
    requests = [(path, "float16"), (model_of(other[0]), other[1])]
    whole = work.fingerprint(path, "nf4-dq", dtype="float16")
    assert whole != work.fingerprint(path, "nf4-dq", dtype="bfloat16")
    assert ranks.run(2, work.fingerprint_of_rank, requests, "nf4-dq", "tp=2") == [whole] * 2


@pytest.mark.parametrize("quant", ["none", "nf4-dq", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_cut_over_two_ranks(model_of, family, quant):
    """Without this, equal fingerprints would prove nothing: replicas are equal too."""
    plan = dq.plan(model_of(family), quantization_config=quant, mesh="tp=2")
    linears = [t for t in plan.tensors if t.name.endswith("weight") and len(t.shape) == 2]
    assert [t.name for t in linears if t.partition is None] == []


def test_schemes_have_different_fingerprints(model_of):
    found = {quant: work.fingerprint(model_of("llama-gqa"), quant) for quant in (*work.SCHEMES, "fp4")}
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_one_changed_weight_changes_the_fingerprint(model_of, copy_of, name):
    copy = copy_of("llama-gqa")
    weights = load_file(copy / "model.safetensors")
    weights[name].view(-1)[7] += 1.0
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert work.fingerprint(str(copy), "nf4") != work.fingerprint(model_of("llama-gqa"), "nf4")


def test_two_swapped_rows_change_the_fingerprint(model_of, copy_of):
    copy = copy_of("llama-gqa")
    weights = load_file(copy / "model.safetensors")
    weight = weights["model.layers.0.mlp.up_proj.weight"]
    weight[[3, 4]] = weight[[4, 3]]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert work.fingerprint(str(copy), "nf4-dq") != work.fingerprint(model_of("llama-gqa"), "nf4-dq")


@pytest.mark.parametrize("quant", ["none", "nf4-dq", "int8"])
def test_replicas_count_once(ranks, model_of, quant):
    path = model_of("llama-gqa")
    assert ranks.run(4, work.fingerprint, path, quant, "dp=2,tp=2") == [work.fingerprint(path, quant)] * 4


@pytest.mark.parametrize("staging", ["1KiB", "64KiB"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-352", "llama-96", "phi3-packed"])
def test_small_staging_leaves_no_trace(ranks, model_of, family, staging):
    path = model_of(family)
    found = ranks.run(2, work.fingerprint_staged, path, "nf4-dq", "tp=2", staging)
    assert found == [work.fingerprint(path, "nf4-dq")] * 2


def test_number_of_threads_leaves_no_trace(ranks, kjv_tiny):
    """`mean` over one and over two threads differs in its last bit; double quantization must not."""
    threads = torch.get_num_threads()
    found = set()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.add(work.fingerprint(kjv_tiny, "nf4-dq"))
    finally:
        torch.set_num_threads(threads)
    for count in (1, 2):
        found.update(ranks.run(2, work.fingerprint, kjv_tiny, "nf4-dq", "tp=2", threads=count))
    assert len(found) == 1
