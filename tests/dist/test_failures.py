"""What goes wrong on one rank is told on all, with the rank's name, and nothing is written."""

from __future__ import annotations

import dataclasses
import os

import pytest
import work
from safetensors.torch import load_file, save_file

import distquant as dq
from distquant import InputError
from distquant.errors import RankError
from distquant.loading.stream.files import ReadError


def all_input_errors(errors: list, *words: str) -> None:
    assert [type(error) for error in errors] == [InputError] * len(errors)
    for error in errors:
        for word in words:
            assert word in str(error)


def planned(path: str, mesh: str, quant: str = "nf4") -> dq.LoadPlan:
    return dq.plan(path, quantization_config=quant, mesh=mesh)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_sharded_model_refuses_to_save(ranks, model_of, tmp_path, quant):
    target = tmp_path / "saved"
    errors = ranks.run(2, work.error_of, work.save_sharded, model_of("llama-gqa"), quant, "tp=2", str(target))
    all_input_errors(errors, "save_pretrained", "tp=1")
    assert not target.exists()


def test_rank_with_other_files_is_named(ranks, model_of, copy_of):
    path, copy = model_of("llama-gqa"), copy_of("llama-gqa")
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    plan = planned(path, "tp=2")
    plans = [plan, dataclasses.replace(plan, model=str(copy))]
    all_input_errors(ranks.run(2, work.error_of, work.load_planned, plans), "rank 1", "model.safetensors", "differs")


def test_rank_without_files_is_named(ranks, model_of, tmp_path):
    plan = planned(model_of("llama-gqa"), "tp=3")
    plans = [plan, plan, dataclasses.replace(plan, model=str(tmp_path / "nowhere"))]
    all_input_errors(ranks.run(3, work.error_of, work.load_planned, plans), "rank 2", "nowhere")


def test_file_truncated_after_planning_is_named(ranks, copy_of):
    copy = copy_of("llama-gqa")
    plan = planned(str(copy), "tp=2")
    file = copy / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    errors = ranks.run(2, work.error_of, work.load_planned, [plan, plan])
    all_input_errors(errors, "model.safetensors", "rank 0", "rank 1")


@pytest.mark.parametrize("moment", ["open_planned", "check_unchanged"])
@pytest.mark.parametrize("change", [work.cut, work.overwrite_the_end])
def test_file_changed_while_loading_is_named(ranks, copy_of, change, moment):
    """The headers were right when they were compared; the bytes may be others when they are read."""
    copy = copy_of("llama-gqa")
    plan = planned(str(copy), "tp=2", "none")
    errors = ranks.run(2, work.error_of, work.load_while_changing, plan, change, moment)
    for error in errors:
        assert isinstance(error, dq.DistquantError)
        assert str(error).startswith("rank ")  # its own, or that of the rank that failed first
        assert "model.safetensors: the file was changed after its header was read (it " in str(error)
    if moment == "check_unchanged":
        assert [type(error) for error in errors] == [ReadError, RankError], "one rank says it, for all"


def test_ranks_with_different_plans_stop(ranks, model_of):
    """Each plan is good by itself; together they would give a model that is neither."""
    plans = [planned(model_of("llama-gqa"), "tp=2", quant) for quant in ("nf4", "fp4")]
    all_input_errors(ranks.run(2, work.error_of, work.load_planned, plans), "plan", *(plan_name(p) for p in plans))


def plan_name(plan: dq.LoadPlan) -> str:
    """What a plan is told as: its digest without the folder."""
    return dataclasses.replace(plan, model="").digest[:16]


@pytest.mark.parametrize("mesh", ["tp=3", "dp=2,tp=2", "tp=1", None])
def test_mesh_that_is_not_the_world(ranks, model_of, mesh):
    errors = ranks.run(2, work.error_of, work.fingerprint, model_of("llama-gqa"), "nf4", mesh)
    all_input_errors(errors, "mesh", "2")


def test_plan_for_another_world(ranks, model_of):
    plan = planned(model_of("llama-gqa"), "tp=3")
    all_input_errors(ranks.run(2, work.error_of, work.load_planned, [plan, plan]), "tp=3", "2")


def test_mesh_in_a_lone_process(model_of):
    with pytest.raises(InputError, match="2 ranks"):
        dq.load(model_of("llama-gqa"), mesh="tp=2")


def test_all_problems_reach_all_ranks(ranks, model_of):
    errors = ranks.run(2, work.error_of, work.fingerprint, model_of("llama-gqa"), {"quant_method": "nonsense"}, "tp=5")
    all_input_errors(errors, "nonsense")


def test_a_failed_load_leaves_ranks_able_to_load(ranks, model_of):
    """An error that all ranks raise is no reason to start them anew."""
    found = ranks.run(2, work.fingerprint_after_error, model_of("llama-gqa"), "nf4")
    assert found == [work.fingerprint(model_of("llama-gqa"), "nf4")] * 2
