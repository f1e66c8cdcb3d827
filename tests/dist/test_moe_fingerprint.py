"""Experts have the same bits over every mesh: dealt out, cut, both, and in either form of the checkpoint."""

from __future__ import annotations

import pytest
from moe_models import FAMILIES, TURNED, changed
from moe_ranks import EVERY, MESHES, METHODS, MOST, SOME, fingerprints

import distquant as dq

@pytest.mark.parametrize("family", FAMILIES)
def test_one_fingerprint_over_all_meshes_and_forms(ranks, moe_of, family):
    jobs = [(moe_of(family, form), METHODS["nf4-dq"]) for form in ("hub", "fused")]
    whole = fingerprints(jobs)
    assert whole[0] == whole[1]
    for mesh in EVERY if family == "mixtral" else MOST:
        count = 2 if mesh in SOME else 1  # in both forms where it is likely to matter
        assert ranks.run(MESHES[mesh], fingerprints, jobs[:count], mesh) == [whole[:count]] * MESHES[mesh], mesh


@pytest.mark.parametrize("mesh", SOME)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_one_fingerprint_for_every_method(ranks, moe_of, whole_prints, family, mesh):
    jobs = [(moe_of(family), quant) for quant in METHODS.values()]
    found = ranks.run(MESHES[mesh], fingerprints, jobs, mesh)
    for method, *prints in zip(METHODS, whole_prints(family), *found, strict=True):
        assert len(set(prints)) == 1, method


@pytest.fixture(scope="module")
def whole_prints(moe_of):
    """Fingerprints of one rank, a method each."""
    known: dict[str, list[str]] = {}

    def of(family: str) -> list[str]:
        if family not in known:
            known[family] = fingerprints([(moe_of(family), quant) for quant in METHODS.values()])
        return known[family]

    return of


def test_methods_have_different_fingerprints(whole_prints):
    assert len(set(whole_prints("mixtral"))) == len(METHODS)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_cut_and_dealt_out(moe_of, family):
    """Without this, equal fingerprints would prove nothing: replicas are equal too."""
    for mesh, axis in (("tp=2", "tp"), ("ep=2", "ep")):
        plan = dq.plan(moe_of(family), quantization_config="nf4-dq", mesh=mesh)
        experts = [tensor for tensor in plan.tensors if ".experts.*." in tensor.name]
        stacks = {tensor.name.rpartition(".experts.*.")[2] for tensor in experts if tensor.name.endswith("weight")}
        names = {"gate_up_proj", "down_proj"} if family in TURNED else {"gate_proj", "up_proj", "down_proj"}
        assert stacks == {f"{name}.weight" for name in names - ({"gate_proj"} if family == "nemotron-h" else set())}
        for tensor in experts:
            if tensor.name.endswith("weight"):
                assert tensor.scheme == "bitsandbytes_4bit", tensor.name
                assert axis == "ep" or tensor.partition is not None, tensor.name
        whole = dq.plan(moe_of(family), quantization_config="nf4-dq").memory[0]
        assert max(row.quantized for row in plan.memory) < 0.75 * whole.quantized


@pytest.mark.parametrize("quant", ["none", "nf4-dq", "fp8"])
def test_small_staging_leaves_no_trace(ranks, moe_of, quant):
    jobs = [(path, METHODS[quant]) for path in (moe_of("mixtral", "fused"), moe_of("gpt-oss"))]
    found = ranks.run(4, fingerprints, jobs, "ep=2,tp=2", {"staging": "1KiB"})
    assert found == [fingerprints(jobs)] * 4


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.{}.weight"


@pytest.mark.parametrize("part", ["w1", "w2", "w3"])
def test_one_changed_weight_of_one_expert_changes_the_fingerprint(moe_of, tmp_path, part):
    def change(tensors):
        tensors[EXPERT.format(6, part)].view(-1)[7] += 1.0

    jobs = [(path, METHODS["nf4"]) for path in (moe_of("mixtral"), changed(moe_of("mixtral"), tmp_path / "m", change))]
    first, second = fingerprints(jobs)
    assert first != second


@pytest.mark.parametrize("first", ["3 w1", "5 w3"])
def test_swapped_weights_change_the_fingerprint(moe_of, tmp_path, first):
    """Two experts' gates; gate and up of one expert."""

    def change(tensors):
        one, other = EXPERT.format(*first.split()), EXPERT.format(5, "w1")
        tensors[one], tensors[other] = tensors[other], tensors[one]

    jobs = [(path, METHODS["nf4"]) for path in (moe_of("mixtral"), changed(moe_of("mixtral"), tmp_path / "m", change))]
    one, other = fingerprints(jobs)
    assert one != other
