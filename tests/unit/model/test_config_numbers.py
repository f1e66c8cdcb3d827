"""A configuration cannot ask for more than its checkpoint has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distquant.checkpoint import open_checkpoint
from distquant.errors import InputError
from distquant.model import module_limit, number_problems
from distquant.planning.prepared import build_for_load
from distquant.planning.request import Request

SHAPES = {"embed": (2048, 128), "experts": (512, 64, 32)}


def faults(config: dict[str, Any]) -> list[str]:
    return [str(problem) for problem in number_problems(config, SHAPES, "config.json")]


SOUND = [
    {"num_hidden_layers": 1002, "num_experts": 2048, "max_position_embeddings": 10**12, "vocab_size": 10**9},
    {"time_step_limit": [0.0, float("inf")], "rope_parameters": {"factor": 32.0, "mscale": 0, "rope_theta": 10_000}},
    {"pad_token_id": -1, "num_kv_shared_layers": 0, "layer_types": ["full_attention"], "tie_word_embeddings": True},
]


@pytest.mark.parametrize("config", SOUND, ids=str)
def test_a_sound_configuration_has_no_faults(config: dict[str, Any]) -> None:
    assert faults(config) == []


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "depth", "num_blocks"])
def test_layers_are_compared_with_the_tensors(key: str) -> None:
    (fault,) = faults({"text_config": {key: 10**9}})
    assert fault == (
        f"config.json: text_config.{key}: 1000000000 layers, and the checkpoint has 2 tensors (at most 1002 are built)"
        ". Check that config.json belongs to these tensors, and was not changed"
    )


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "llama.expert_count"])
def test_experts_are_compared_with_the_tensors(key: str) -> None:
    (fault,) = faults({key: 10**9})
    assert "1000000000 experts, and no tensor of the checkpoint has room for more than 2048" in fault


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**5000, -(10**5000)], ids=("2^63", "-2^63", "long", "-long"))
def test_a_number_has_64_bits(value: int) -> None:
    (fault,) = faults({"lists": [[1, {"anything": value}]]})
    assert "is not between -2^63 and 2^63" in fault and len(fault) < 300


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1, 0])
def test_rotary_embeddings_divide_by_numbers_above_0(value: float) -> None:
    assert len(faults({"rope_scaling": {"factor": value}})) == 1
    assert len(faults({"rope_parameters": {"full_attention": {"rope_theta": value}}})) == 1


@pytest.mark.parametrize("key", ["num_hidden_layers", "text_config.hidden_size", "llama.block_count", "vocab_size"])
def test_sizes_are_above_0(key: str) -> None:
    assert len(faults({key: 0})) == len(faults({key: -1})) == 1
    assert faults({f"vision_config.{key}": 0}) == []


def test_a_deep_configuration_is_walked() -> None:
    deep: Any = 2**64
    for _ in range(100_000):
        deep = [deep]
    assert len(faults({"deep": deep})) == 1


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-head-norms"])
def test_a_billion_layers_are_not_built(copy_of: Callable[[str], Path], family: str) -> None:
    folder = copy_of(family)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 10**9, "layer_types": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="num_hidden_layers: 1000000000 layers"):
        build_for_load(open_checkpoint(folder), None, Request(model=folder))


def test_modules_have_a_limit_whatever_asks_for_them(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_limit, "ALLOWED", -1000)
    folder = copy_of("llama-gqa")
    with pytest.raises(InputError, match=r"it has more than -\d+ modules, and the checkpoint \d+ tensors"):
        build_for_load(open_checkpoint(folder), None, Request(model=folder))
