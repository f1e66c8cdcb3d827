"""MXFP4 at every width: the same bits quantized on the way and stored, and the logits of the dequantized weights."""

from __future__ import annotations

import pytest
import torch
import work
from test_logits import ROUNDING, distance
from upstream import their_model

import distquant as dq
from models import save_as_stored
from distquant.kernels import reference

FAMILY = "llama-352"
"""352 inputs are 11 runs of 32, which two and three ranks share unevenly."""


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory) -> str:
    """What one rank saves quantized."""
    folder = tmp_path_factory.mktemp("mxfp4")
    save_as_stored(dq.load(model_of(FAMILY), quantization_config="mxfp4"), folder)
    return str(folder)


def test_fingerprint_is_the_same_at_every_width(ranks, model_of, saved):
    path = model_of(FAMILY)
    whole = work.fingerprint(path, "mxfp4")
    assert work.fingerprint(saved, None) == whole
    for width in (2, 3):
        assert ranks.run(width, work.fingerprint, path, "mxfp4", f"tp={width}") == [whole] * width
        assert ranks.run(width, work.fingerprint, saved, None, f"tp={width}") == [whole] * width
    assert ranks.run(2, work.fingerprint_staged, path, "mxfp4", "tp=2", "1KiB") == [whole] * 2


def test_every_projection_is_cut(model_of, saved):
    for path, quant in ((model_of(FAMILY), "mxfp4"), (saved, None)):
        plan = dq.plan(path, quantization_config=quant, mesh="tp=3")
        assert [t.name for t in plan.tensors if t.scheme != "none" and t.partition is None] == []
        became = {rule.pattern.rpartition(".")[2]: rule.became for rule in plan.rules}
        assert became["down_proj"] == "rowwise 128+128+96"


def test_finished_bytes_are_those_of_the_plan(ranks, model_of):
    plan = dq.plan(model_of(FAMILY), quantization_config="mxfp4", mesh="tp=3")
    reports = [report for _, report in ranks.run(3, work.loaded, plan)]
    assert [report.quantized_bytes for report in reports] == [rank.quantized for rank in plan.memory]


def test_logits_are_those_of_the_dequantized_weights(ranks, model_of):
    """The weights of transformers' model are put through the definition one by one."""
    truth, ours = their_model(model_of(FAMILY), dtype=torch.float32), work.exact(model_of(FAMILY), "mxfp4")
    for path in ours.distquant.plan.converted:
        weight = truth.get_submodule(path).weight.data
        weight.copy_(reference.dequantize_mxfp4(*reference.quantize_mxfp4(weight)))
    with torch.no_grad():
        expected = truth(torch.tensor(work.IDS)).logits
    assert distance(work.logits(model_of(FAMILY), "mxfp4"), expected) < ROUNDING
    found = ranks.run(2, work.logits, model_of(FAMILY), "mxfp4", "tp=2")
    assert torch.equal(found[0], found[1])
    assert distance(found[0], expected) < ROUNDING
