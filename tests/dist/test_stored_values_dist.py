"""A stored value that only one rank keeps ends the load on all ranks, with its tensor's name."""

from __future__ import annotations

import math
from functools import partial

import pytest
import spoilt_values
import work
from safetensors.torch import load_file, save_file
from spoilt_values import Case, put

from distquant import InputError
from distquant.errors import DistquantError

PART = {"nf4": ("weight.absmax", -1, "absmax"), "fp8/blocks": ("weight_scale_inv", 0, "weight_scale_inv")}
"""Checkpoint -> suffix of a component that is divided, the element that is spoilt, and its name in messages."""


@pytest.mark.parametrize("base", PART)
def test_a_value_of_one_rank_ends_all(ranks, model_of, tmp_path, base):
    suffix, element, component = PART[base]
    folder = spoilt_values.write_base(base, model_of("llama-gqa"), tmp_path / "stored")
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    tensors[name].view(-1)[element] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    errors = ranks.run(2, work.error_of, work.fingerprint, str(folder), None, "tp=2")
    assert all(isinstance(error, DistquantError) for error in errors)
    assert [type(error) for error in errors].count(InputError) == 1, "the other rank does not keep it"
    for error in errors:
        assert f"model.layers.0.mlp.up_proj.weight: {component} holds nan, and must be finite" in str(error)


def test_a_value_of_all_ranks_has_one_message(ranks, model_of, tmp_path):
    folder = spoilt_values.write_base("nf4-dq", model_of("llama-gqa"), tmp_path / "stored")
    case = Case("nf4-dq", "weight.nested_absmax", "nan", partial(put, math.nan))
    spoilt_values.spoilt(folder, case, tmp_path / "spoilt")
    errors = ranks.run(2, work.error_of, work.fingerprint, str(tmp_path / "spoilt"), None, "tp=2")
    messages = {str(error).split("failed: ")[-1] for error in errors}
    assert len(messages) == 1 and "nested_absmax holds nan" in messages.pop()
