"""Planning in stages: each is frozen, and follows from the one before alone."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

import distquant as dq
from distquant.checkpoint import open_checkpoint
from distquant.config.resolve import resolve
from distquant.environment import Environment
from distquant.errors import InputError, Problems
from distquant.model import build
from distquant.planning.described import Described, describe, fields_of
from distquant.planning.planned import plan_memory
from distquant.planning.planner import partition
from distquant.planning.prepared import Prepared
from distquant.planning.request import Request, read_request
from distquant.planning.validation import check_described, check_rank_memory
from distquant.quantization import config_classes


def described(model: str, problems: Problems, **options: Any) -> Described:
    """The first stage of a load in bfloat16, on an unknown machine."""
    request = Request(model=model, **options)
    given = read_request(request, problems)
    checkpoint = open_checkpoint(model)
    merged, skipped = resolve(checkpoint.config, given.config, config_classes(), request.on_unsupported)
    prepared = Prepared(checkpoint, build(checkpoint.path, given.dtype))
    return describe(request, given, Environment(), prepared, merged, skipped, problems)


@pytest.mark.parametrize("mesh", [None, "tp=2", "ep=2,tp=2"])
@pytest.mark.parametrize("quant", ["none", "nf4-dq", "hqq"])
def test_later_stages_leave_the_earlier_as_they_were(moe_of, mesh: str | None, quant: str) -> None:
    """A stage that changed one before it would give another result the second time."""
    problems = Problems()
    first = described(moe_of("mixtral"), problems, mesh=mesh, quantization_config=quant)
    description, converted = copy.deepcopy(first.description), first.converted
    planned = [plan_memory(partition(first)) for _ in range(2)]
    assert not problems
    assert planned[0].tensors == planned[1].tensors
    assert planned[0].memory == planned[1].memory
    assert (first.description, first.converted) == (description, converted)
    assert planned[0].tensors == dq.plan(moe_of("mixtral"), mesh=mesh, quantization_config=quant).tensors


def test_a_stage_has_all_of_the_one_before_and_cannot_be_changed(kjv_tiny: str) -> None:
    first = described(kjv_tiny, Problems(), mesh="tp=2", quantization_config="nf4-dq")
    second = partition(first)
    third = plan_memory(second)
    assert fields_of(first).items() <= fields_of(second).items()
    assert fields_of(second).items() <= fields_of(third).items()
    for stage in (first, second, third):
        with pytest.raises(FrozenInstanceError):
            stage.converted = ()  # type: ignore[misc]


def test_checks_of_every_stage_add_to_the_same_problems(moe_of) -> None:
    """None raises, so that what a later stage finds is reported with what the first one did."""
    problems = Problems()
    selection = {"quant_method": "bitsandbytes", "load_in_4bit": True, "include_modules": [".*q_porj"]}
    first = described(moe_of("mixtral"), problems, mesh="ep=9", quantization_config=selection)
    environment = Environment(device_count=4, memory=1 << 20, memory_source="max_memory")
    check_described(first, environment, False, problems)
    check_rank_memory(plan_memory(partition(first)), environment, problems)
    with pytest.raises(InputError) as caught:
        problems.raise_if_any()
    wheres = [problem.where for problem in caught.value.problems]
    assert [where for where in wheres if where != "environment"] == [
        "include_modules",
        "mesh",
        "mesh",
        "rank 0 (and 8 more)",
    ]


def test_a_step_that_planning_needs_is_reported_with_what_was_wrong_before(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        dq.plan(tmp_path / "nothing", mesh="pt=2", dtype="int3")
    first, second, *others = (problem.where for problem in caught.value.problems)
    assert (first, second) == ("mesh", "dtype") and others
