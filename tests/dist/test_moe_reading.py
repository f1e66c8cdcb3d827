"""Bytes of experts: read once, by the ranks that keep them, and finished as the plan says."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
import work
from moe_models import FAMILIES
from moe_ranks import EVERY, MESHES, METHODS, SOME, bytes_of_experts, own_fingerprint, sizes
from safetensors.torch import load_file, save_file

import distquant as dq
from distquant.checkpoint import open_checkpoint

UNEVEN = {"mixtral": 8, "olmoe": 11, "gpt-oss": 5}
"""Experts of families that three ranks do not share evenly."""


def weight_bytes(path: str) -> int:
    """Bytes of all tensors; the models here use every one."""
    return sum(info.nbytes for info in open_checkpoint(path).tensors.values())


@pytest.mark.parametrize("mesh", EVERY)
def test_each_byte_is_read_once_and_kept_as_planned(ranks, moe_of, mesh):
    """Replicas (dp, and dense weights over ep) read a share each."""
    jobs = [(moe_of("mixtral"), METHODS["nf4-dq"]), (moe_of("mixtral", "fused"), METHODS["none"])]
    if mesh in SOME:
        jobs += [(moe_of("mixtral"), METHODS["none"]), (moe_of("mixtral", "fused"), METHODS["int8"])]
        jobs += [(moe_of("gpt-oss"), METHODS[quant]) for quant in ("none", "nf4-dq", "int8")]
    found = ranks.run(MESHES[mesh], sizes, jobs, mesh)
    for number, (path, _) in enumerate(jobs):
        rows = [rank[number] for rank in found]
        assert sum(row["read"] for row in rows) == weight_bytes(path)
        for row in rows:
            assert row["read"] == row["planned read"]
            assert row["quantized"] == row["planned quantized"]
            assert row["reported"] == row["planned"]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_take_the_bytes_of_the_plan(moe_of, family):
    """What lies in memory, to 1%: of double quantization each expert has its offset beside."""
    for method, quant in METHODS.items():
        if method != "none":
            held, planned = bytes_of_experts(moe_of(family), quant)
            assert held == pytest.approx(planned, rel=0.01 if method == "nf4-dq" else 0), method


@pytest.mark.parametrize("family", UNEVEN)
def test_ranks_differ_where_experts_do_not_divide(moe_of, family):
    plan = dq.plan(moe_of(family), quantization_config="nf4-dq", mesh="ep=3")
    whole = dq.plan(moe_of(family), quantization_config="nf4-dq").memory[0].parameters
    held = [row.parameters for row in plan.memory]
    assert len(set(held)) == 2
    assert max(held) < whole
    dense = (sum(held) - whole) // 2  # on all three
    expert = (whole - dense) / UNEVEN[family]
    assert sorted((count - dense) / expert for count in held) == sorted(dealt(UNEVEN[family], 3))


def dealt(experts: int, ranks: int) -> list[int]:
    """How many experts each rank gets."""
    return [experts // ranks + (rank < experts % ranks) for rank in range(ranks)]


@pytest.mark.parametrize("quant", ["none", "nf4-dq"])
@pytest.mark.parametrize("form", ["hub", "fused"])
def test_each_rank_reads_only_its_experts(ranks, moe_of, tmp_path, form, quant):
    """Every rank has files of its own, in which the other ranks' experts are spoiled."""
    path = moe_of("olmoe", form)
    plan = dq.plan(path, quantization_config=quant, mesh="ep=3")
    first, plans = 0, []
    for rank, count in enumerate(dealt(UNEVEN["olmoe"], 3)):
        mine = range(first, first + count)
        plans.append(dataclasses.replace(plan, model=others_spoiled(path, tmp_path / str(rank), mine)))
        first += count
    assert ranks.run(3, own_fingerprint, plans) == [work.fingerprint(path, quant)] * 3


@pytest.mark.parametrize("per_node", [1, 2])
@pytest.mark.parametrize("quant", ["nf4-dq", "fp8-tensor"])
@pytest.mark.parametrize("mesh", ["ep=2,tp=2", "ep=4"])
def test_nodes_read_their_own_experts(ranks, moe_of, mesh, quant, per_node):
    """Ranks of one row on two nodes bring their statistics together, and only they."""
    path = moe_of("mixtral")
    plan = dq.plan(path, quantization_config=quant, mesh=mesh, ranks_per_node=per_node)
    assert len(set(plan.nodes)) == 4 // per_node
    found = ranks.run(4, work.loaded, plan, {"io": "buffered"})
    assert {fingerprint for fingerprint, _ in found} == {work.fingerprint(path, quant)}
    assert [report.bytes_read for _, report in found] == [row.read for row in plan.memory]
    if mesh == "ep=4":
        assert max(row.read for row in plan.memory) < 0.5 * weight_bytes(path)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"model.layers.0": "cpu", "": "cpu"}])
def test_experts_by_device_map(moe_of, device_map):
    path = moe_of("gpt-oss")
    model = dq.load(path, quantization_config="nf4-dq", device_map=device_map, max_memory={"cpu": "1GiB"})
    assert dq.fingerprint(model) == work.fingerprint(path, "nf4-dq")
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor(work.IDS)).logits).all()


def others_spoiled(path: str, target: Path, mine: range) -> str:
    """A copy of a checkpoint, file by file, in which experts that are not `mine` are NaN."""
    shutil.copytree(path, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            number = re.search(r"\.experts\.(\d+)\.", name)
            if number and int(number[1]) not in mine:
                value.fill_(torch.nan)
            elif ".experts." in name and not number:
                value[[n for n in range(len(value)) if n not in mine]] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
    return str(target)
