"""Groups that do not fit: one error, with the modules, the reason, and a setting that really works."""

from __future__ import annotations

import re
from typing import Any

import pytest

import distquant as dq


def problems(model: str, quant: Any) -> tuple[Any, ...]:
    with pytest.raises(dq.InputError) as caught:
        dq.plan(model, quantization_config=quant)
    return caught.value.problems


@pytest.mark.parametrize(("name", "skip"), [("int4", "ignore"), ("awq-rtn", "modules_to_not_convert")])
def test_one_error_counts_the_modules_and_names_the_size_that_works(model_of, name: str, skip: str) -> None:
    """Of 192 = 1.5 groups; all other inputs of this model are 128."""
    path = model_of("llama-gqa")
    (problem,) = problems(path, name)
    assert str(problem) == (
        "quantization_config.group_size: 128 does not fit 2 of 14 modules, whose in_features are not a multiple of it: "
        f"192 in 2 modules (model.layers.0.mlp.down_proj, ...). Use group_size=64: '{name}-g64' has it; "
        f"or leave them unquantized with {skip}"
    )
    assert dq.plan(path, quantization_config=f"{name}-g64").converted


def test_the_size_fits_all_modules(model_of) -> None:
    """Inputs of 96 and 352 have 32 in common, and not 64."""
    path = model_of("llama-96")
    (problem,) = problems(path, "int4")
    assert "96 in 12 modules (model.layers.0.self_attn.q_proj, ...), 352 in 2 modules" in problem.what
    (name,) = re.findall(r"Use group_size=32: '(\S+)' has it", problem.fix)
    assert dq.plan(path, quantization_config=name).converted


def test_a_size_without_a_short_name_is_a_number(model_of) -> None:
    (problem,) = problems(model_of("llama-gqa"), {"quant_method": "awq", "bits": 4, "group_size": 80})
    assert problem.fix.startswith("Use group_size=64; or leave them")
    config = {"quant_method": "awq", "bits": 4, "group_size": 64}
    assert dq.plan(model_of("llama-gqa"), quantization_config=config).converted


def test_experts_are_counted_as_stacks(moe_of) -> None:
    (problem,) = problems(moe_of("mixtral"), "int4")
    assert "experts.*.down_proj" in problem.what or "experts" in problem.what
    assert "'int4-g" in problem.fix


@pytest.mark.parametrize("name", ["gptq-rtn", "hqq", "quanto-int4"])
def test_methods_with_short_or_running_groups_take_it(model_of, name: str) -> None:
    assert dq.plan(model_of("llama-gqa"), quantization_config=name).converted


@pytest.mark.parametrize("name", ["int4-g64", "int4-g32", "awq-rtn-g64", "gptq-rtn-g64", "gptq-rtn-g32", "hqq-g32"])
def test_names_with_sizes_load(model_of, name: str) -> None:
    """With the bits of the same configuration in full."""
    config = dq.plan(model_of("llama-gqa"), quantization_config=name).quantization_config
    by_name = dq.load(model_of("llama-gqa"), quantization_config=name)
    in_full = dq.load(model_of("llama-gqa"), quantization_config=config)
    assert dq.fingerprint(by_name) == dq.fingerprint(in_full)
