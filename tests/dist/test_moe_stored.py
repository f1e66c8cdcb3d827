"""Checkpoints that store experts quantized: one fingerprint at every mesh, and the values that the codes mean."""

from __future__ import annotations

from pathlib import Path

import moe_ranks
import pytest
import torch
import work
from moe_ranks import MESHES, SOME
from moe_stored import KINDS, save_stored, write_mxfp4
from test_logits import ROUNDING, distance
from upstream import their_model

import distquant as dq

DEQUANTIZE = {"dequantize": True}


@pytest.fixture(scope="module")
def stored(moe_of, tmp_path_factory):
    """Paths of a quantized checkpoint and of its dense twin."""
    root = tmp_path_factory.mktemp("stored")
    known: dict[str, tuple[str, str]] = {}

    def paths(kind: str) -> tuple[str, str]:
        if kind not in known:
            source = Path(moe_of(KINDS[kind][0]))
            target, twin = save_stored(kind, source, root / kind.replace(" ", "-"))
            known[kind] = (str(target), str(twin))
        return known[kind]

    return paths


@pytest.fixture(scope="module")
def truth(stored):
    """transformers' logits of the dense twin."""
    known: dict[str, torch.Tensor] = {}

    def of(kind: str) -> torch.Tensor:
        if kind not in known:
            with torch.no_grad():
                known[kind] = their_model(stored(kind)[1], dtype=torch.float32)(torch.tensor(work.IDS)).logits
        return known[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_one_fingerprint_over_meshes(ranks, stored, kind):
    jobs = [(stored(kind)[0], None)]
    whole = moe_ranks.fingerprints(jobs)
    for mesh in SOME:
        assert ranks.run(MESHES[mesh], moe_ranks.fingerprints, jobs, mesh) == [whole] * MESHES[mesh], mesh
    if kind in ("fp8", "gptq act order"):
        assert ranks.run(2, moe_ranks.fingerprints, jobs, "tp=2", {"staging": "1KiB"}) == [whole] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_experts_stay_quantized(stored, kind):
    """The bytes of the file, not those of the twin."""
    path, twin = stored(kind)
    plan = dq.plan(path)
    assert plan.prequantized
    assert [tensor.name for tensor in plan.tensors if ".experts." in tensor.name and tensor.scheme == "none"] == [
        tensor.name for tensor in plan.tensors if ".experts." in tensor.name and tensor.name.endswith("bias")
    ]
    assert plan.memory[0].finished < 0.5 * dq.plan(twin, dtype="float32").memory[0].finished


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dense_values(ranks, stored, truth, kind):
    jobs = [(stored(kind)[0], None)]
    (whole,) = moe_ranks.logits(jobs)
    assert distance(whole, truth(kind)) < ROUNDING
    for mesh in ("ep=2,tp=2", "ep=3"):
        for (found,) in ranks.run(MESHES[mesh], moe_ranks.logits, jobs, mesh):
            assert distance(found, truth(kind)) < ROUNDING, mesh


@pytest.mark.parametrize("kind", KINDS)
def test_each_byte_of_stored_experts_is_read_once(ranks, stored, kind):
    for mesh in ("ep=2", "tp=2"):
        rows = [row for (row,) in ranks.run(2, moe_ranks.sizes, [(stored(kind)[0], None)], mesh)]
        for row in rows:
            assert row["read"] == row["planned read"]
            assert row["quantized"] == row["planned quantized"]
            assert row["reported"] == row["planned"]


def test_fused_components_are_split_into_gate_and_up(ranks, moe_of, tmp_path):
    """MXFP4 under the names of fused parameters, of a model that keeps gate and up apart."""
    stored, twin = tmp_path / "stored", tmp_path / "twin"
    write_mxfp4(Path(moe_of("mixtral", "fused")), stored, twin, transposed=False)
    jobs = [(str(stored), None)]
    (found,) = moe_ranks.logits(jobs)
    with torch.no_grad():
        assert distance(found, their_model(str(twin), dtype=torch.float32)(torch.tensor(work.IDS)).logits) < ROUNDING
    assert ranks.run(4, moe_ranks.fingerprints, jobs, "ep=2,tp=2") == [moe_ranks.fingerprints(jobs)] * 4


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_dequantized_on_request(ranks, stored, truth, kind):
    """Ordinary weights in the model's own modules, the same at every mesh."""
    path = stored(kind)[0]
    model = dq.load(path, quantization_config=DEQUANTIZE, dtype="float32")
    assert type(model.model.layers[1].mlp.experts).__name__ in ("DeepseekV3Experts", "GptOssExperts")
    with torch.no_grad():
        assert distance(model(torch.tensor(work.IDS)).logits, truth(kind)) < ROUNDING
    jobs = [(path, DEQUANTIZE)]
    whole = moe_ranks.fingerprints(jobs)
    for mesh in ("ep=3", "tp=2"):
        assert ranks.run(MESHES[mesh], moe_ranks.fingerprints, jobs, mesh) == [whole] * MESHES[mesh], mesh
