"""Bytes of experts: read once, by the ranks that keep them, and finished as the plan says."""

from __future__ import annotations

import json
import re

import pytest
import work
from moe_models import FAMILIES
from moe_ranks import MESHES, METHODS, sizes

import distquant as dq
from distquant.checkpoint import open_checkpoint

UNEVEN = {"mixtral": 8, "olmoe": 11, "gpt-oss": 5}
"""Experts of families that three ranks do not share evenly."""


def weight_bytes(path: str) -> int:
    """Bytes of all tensors; the models here use every one."""
    return sum(info.nbytes for info in open_checkpoint(path).tensors.values())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_each_byte_is_read_once_and_kept_as_planned(ranks, moe_of, family, mesh):
    """Replicas (dp, and dense weights over ep) read a share each."""
    forms = ("hub", "fused") if family == "mixtral" else ("hub",)
    jobs = [(moe_of(family, form), METHODS[quant]) for form in forms for quant in ("none", "nf4-dq", "int8")]
    found = ranks.run(MESHES[mesh], sizes, jobs, mesh)
    for number, (path, _) in enumerate(jobs):
        rows = [rank[number] for rank in found]
        assert sum(row["read"] for row in rows) == weight_bytes(path)
        for row in rows:
            assert row["read"] == row["planned read"]
            assert row["quantized"] == row["planned quantized"]
            assert row["reported"] == row["planned"]


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "fp8", "fp8-row", "int4", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_take_the_bytes_of_the_plan(moe_of, family, quant):
    """What lies in memory, to 1%: the method's tables of a few values a weight are not in the plan."""
    (row,) = sizes([(moe_of(family), METHODS[quant])])
    assert row["planned"] == row["reported"]
    assert row["held"] == pytest.approx(row["planned"], rel=0.01)


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
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_each_rank_reads_only_its_experts(ranks, moe_of, tmp_path, family, quant):
    """The trace names the tensors that every rank read."""
    file = tmp_path / "trace.json"
    plan = dq.plan(moe_of(family), quantization_config=quant, mesh="ep=3")
    ranks.run(3, work.loaded, plan, {"trace": str(file)})
    read: dict[int, set[int]] = {rank: set() for rank in range(3)}
    for event in json.loads(file.read_text())["traceEvents"]:
        number = re.search(r"\.experts\.(\d+)\.", event["name"])
        if event.get("cat") == "read" and number:
            read[event["pid"]].add(int(number[1]))
    assert [len(numbers) for numbers in read.values()] == dealt(UNEVEN[family], 3)
    assert sorted(number for numbers in read.values() for number in numbers) == list(range(UNEVEN[family]))
