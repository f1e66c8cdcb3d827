"""FP8 at every width: the same bits quantized on the way and stored, logits, gradients, and what each rank reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lora
import pytest
import torch
import work
from test_adapters import compare
from test_logits import ROUNDING, distance

import distquant as dq

DATA = Path(__file__).resolve().parents[1] / "data"
TILES = {"quant_method": "fp8", "weight_block_size": [16, 32]}
METHODS: dict[str, Any] = {
    "tiles of 16 x 32": TILES,
    "tiles of 16 x 32 with ue8m0": {**TILES, "scale_fmt": "ue8m0"},
    "fp8": "fp8",
    "fp8-tensor": "fp8-tensor",
    "mxfp8": "mxfp8",
    "fbgemm_fp8": "fbgemm_fp8",
}
FAMILIES = ("phi3-packed", "llama-352")
ALIKE = ("tiles of 16 x 32 with ue8m0", "mxfp8")
"""Tiles with scales of their own, as those of 16 x 32: they flow and are cut alike; sizes and rounding differ."""
CASES = [(f, m) for f in FAMILIES for m in METHODS if f == "llama-352" or m not in ALIKE]
GOLDEN = ("fp8/blocks", "fp8/ue8m0", "fp8/deepseek-v3", "fp8/tensor", "mxfp8", "fbgemm_fp8")


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    """Path of a family's checkpoint as one rank saves it quantized."""
    root = tmp_path_factory.mktemp("fp8")

    def path(family: str, method: str) -> str:
        folder = root / f"{family}-{method.replace(' ', '-')}"
        if not folder.exists():
            dq.load(model_of(family), quantization_config=METHODS[method]).save_pretrained(folder)
        return str(folder)

    return path


@pytest.mark.parametrize(("family", "method"), CASES)
def test_fingerprint_is_the_same_at_every_width(ranks, model_of, saved, family, method):
    """Quantized on the way and stored."""
    path, quant = model_of(family), METHODS[method]
    whole = work.fingerprint(path, quant)
    assert work.fingerprint(saved(family, method), None) == whole
    for width in (2, 3, 4):
        assert ranks.run(width, work.fingerprint, path, quant, f"tp={width}") == [whole] * width
        assert ranks.run(width, work.fingerprint, saved(family, method), None, f"tp={width}") == [whole] * width


@pytest.mark.parametrize("method", [name for name in METHODS if name != "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_is_cut_over_two_ranks(model_of, saved, family, method):
    for path, quant in ((model_of(family), METHODS[method]), (saved(family, method), None)):
        plan = dq.plan(path, quantization_config=quant, mesh="tp=2")
        assert [t.name for t in plan.tensors if t.scheme != "none" and t.partition is None] == []


@pytest.mark.parametrize("width", [2, 3])
def test_tiles_of_128_move_a_cut(ranks, model_of, width):
    """352 features are two tiles and a ragged one; attention of 128 features cannot be cut, the plan says so."""
    path = model_of("llama-352")
    plan = dq.plan(path, quantization_config="fp8", mesh=f"tp={width}")
    became = {rule.pattern.rpartition(".")[2]: rule.became for rule in plan.rules}
    assert became["down_proj"] == {2: "rowwise 256+96", 3: "rowwise 128+128+96"}[width]
    assert became["o_proj"] == "replicate"
    (reason,) = {rule.reason for rule in plan.rules if rule.pattern.endswith("o_proj")}
    assert "aligned to 128" in reason


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_checkpoints_have_one_fingerprint(ranks, name):
    path = str(DATA / name)
    whole = work.fingerprint(path, None)
    for width in (2, 3, 4):
        assert ranks.run(width, work.fingerprint, path, None, f"tp={width}") == [whole] * width


def test_methods_have_different_fingerprints(model_of):
    found = {method: work.fingerprint(model_of("llama-gqa"), quant) for method, quant in METHODS.items()}
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("method", METHODS)
def test_finished_bytes_are_those_of_the_plan(ranks, model_of, saved, method):
    for path, quant in ((model_of("llama-352"), METHODS[method]), (saved("llama-352", method), None)):
        plan = dq.plan(path, quantization_config=quant, mesh="tp=3")
        reports = [report for _, report in ranks.run(3, work.loaded, plan)]
        assert [report.quantized_bytes for report in reports] == [rank.quantized for rank in plan.memory]


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ALIKE])
def test_small_staging_leaves_no_trace(ranks, model_of, method):
    path, quant = model_of("llama-352"), METHODS[method]
    found = ranks.run(2, work.fingerprint_staged, path, quant, "tp=2", "1KiB")
    assert found == [work.fingerprint(path, quant)] * 2


@pytest.mark.parametrize("method", ["fp8-tensor", "fbgemm_fp8"])
def test_statistics_cross_nodes(ranks, model_of, method):
    """Ranks of a row on two nodes: a tensor's amax and a row's scale come together."""
    path = model_of("llama-352")
    plan = dq.plan(path, quantization_config=method, mesh="tp=2", ranks_per_node=1)
    assert len(set(plan.nodes)) == 2
    found = [print_ for print_, _ in ranks.run(2, work.loaded, plan)]
    assert found == [work.fingerprint(path, method)] * 2


@pytest.mark.parametrize("method", ["fp8", "fp8-tensor", "mxfp8", "fbgemm_fp8"])
@pytest.mark.parametrize("family", ["qwen2-biases", "phi3-packed"])
def test_logits_equal_those_of_one_rank(ranks, model_of, family, method):
    found = ranks.run(2, work.logits, model_of(family), method, "tp=2")
    assert torch.equal(found[0], found[1])
    assert distance(found[0], work.logits(model_of(family), method)) < ROUNDING


@pytest.mark.parametrize("method", ["fp8-tensor", "fbgemm_fp8"])
def test_products_in_float8_differ_by_their_own_error(ranks, model_of, method):
    """Ranks that hold part of the inputs round their part of the activations; weights are the same bits."""
    path = model_of("llama-gqa")
    found = ranks.run(2, work.logits_in_float8, path, method, "tp=2")
    assert torch.equal(found[0], found[1])
    whole, exact = work.logits_in_float8(path, method), work.logits(path, method)
    error = distance(whole, exact)
    assert ROUNDING < error < 0.2
    assert distance(found[0], exact) < 2 * error


@pytest.mark.parametrize("method", ["fp8-tensor", "mxfp8", "fbgemm_fp8"])
def test_adapters_learn_as_on_one_rank(ranks, model_of, method):
    path = model_of("llama-gqa")
    whole = lora.train(path, method, None)
    compare(path, method, "tp=2", ranks.run(2, lora.train, path, method, "tp=2"), whole)


def test_state_is_the_same_after_generate(ranks, model_of):
    for method in ("fp8", "mxfp8", "fbgemm_fp8"):
        for before, after, changed in ranks.run(
            2, work.traces_of_generate, model_of("llama-gqa"), method, "tp=2", False
        ):
            assert (before, changed) == (after, [])
