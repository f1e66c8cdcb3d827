"""Modules of experts: their form is recognised, and every projection of every expert is found in the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import FAMILIES, FORMS, SMALL, TURNED, read_all
from torch import Tensor, nn

from distquant.errors import Problems
from distquant.model import (
    ModelDescription,
    Source,
    build,
    describe_model,
    source_numel,
    sources_by_expert,
    split_experts,
)
from distquant.model.description import ROWS, ExpertsDescription, Projection
from distquant.model.experts import experts_of, form_of

MX = {"*_blocks": "", "*_scales": "scales"}
FP8 = {"weight_scale_inv": "weight_scale_inv"}


def split(folder: Path, tensors: dict[str, Tensor], suffixes: dict[str, str] | None = None) -> ModelDescription:
    """The description of a checkpoint with these tensors, all modules of experts split."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    description = describe_model(build(folder, None), shapes, suffixes or {}, Problems())
    return split_experts(description, description.experts, shapes)


def by_expert(description: ModelDescription, name: str, tensors: dict[str, Tensor]) -> list[tuple[Source, ...]]:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return sources_by_expert(description.sources[name], description.params[name].shape[0], shapes)


def taken_part(source: Source, tensor: Tensor) -> Tensor:
    """What a source takes, without the dim of one expert."""
    if source.take is None:
        return tensor
    dim, start, stop = source.take
    if dim == ROWS:
        return tensor.flatten(0, 1)[start:stop]
    return tensor.narrow(dim, start, stop - start).squeeze(dim)


# -- forms -------------------------------------------------------------------------------------------------------------


def described(family: str) -> list[ExpertsDescription]:
    """The experts of a family's model on `meta`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, differs = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**SMALL, **differs})
    with torch.device("meta"):
        known, unknown = experts_of(AutoModelForCausalLM.from_config(config))
    assert not unknown
    return list(known.values())


def split_form(name: str, count: int, intermediate: int, hidden: int) -> ExpertsDescription:
    """Gate, up and down apart, as most models have them."""
    gate = Projection("gate_proj", "gate_up_proj", intermediate, hidden)
    up = Projection("up_proj", "gate_up_proj", intermediate, hidden, start=intermediate)
    down = Projection("down_proj", "down_proj", hidden, intermediate, shard_dim=1)
    return ExpertsDescription(name, count, intermediate, (gate, up, down))


def packed_form(name: str, count: int, intermediate: int, hidden: int, **more: bool) -> ExpertsDescription:
    """Gate and up in one, stored transposed."""
    both = Projection("gate_up_proj", "gate_up_proj", 2 * intermediate, hidden)
    down = Projection("down_proj", "down_proj", hidden, intermediate, shard_dim=1)
    return ExpertsDescription(name, count, intermediate, (both, down), transposed=True, **more)


UNGATED = (Projection("up_proj", "up_proj", 352, 64), Projection("down_proj", "down_proj", 64, 352, shard_dim=1))
EXPECTED = {
    "mixtral": [split_form(f"model.layers.{n}.mlp.experts", 8, 96, 64) for n in range(2)],
    "qwen2-moe": [split_form(f"model.layers.{n}.mlp.experts", 8, 352, 64) for n in range(2)],
    "olmoe": [split_form(f"model.layers.{n}.mlp.experts", 11, 96, 96) for n in range(2)],
    "deepseek-v3": [split_form(f"model.layers.{n}.mlp.experts", 8, 160, 192) for n in (1, 2)],
    "nemotron-h": [ExpertsDescription(f"model.layers.{n}.mixer.experts", 7, 352, UNGATED) for n in (1, 4)],
    "gpt-oss": [packed_form(f"model.layers.{n}.mlp.experts", 5, 96, 64, interleaved=True, bias=True) for n in range(2)],
    "llama4": [packed_form(f"model.layers.{n}.feed_forward.experts", 4, 96, 64, dense=True) for n in (1, 2)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_of_models_are_recognised(family):
    assert described(family) == EXPECTED[family]


SHAPES = {"gate_up_proj": (4, 12, 5), "down_proj": (4, 5, 6)}
MARKS: dict[str, Any] = {"is_transposed": False, "is_concatenated": True, "has_gate": True, "has_bias": False}


def form(shapes: dict[str, tuple[int, ...]], **marks: Any) -> ExpertsDescription | None:
    """The form of a module with these marks, which are transformers' own."""
    module = nn.Module()
    for mark, value in (MARKS | marks).items():
        if value is not None:
            setattr(module, mark, value)
    return form_of("experts", module, shapes)


def test_marks_that_an_older_version_does_not_set_have_its_meaning():
    """transformers 5.17 sets no `has_post_expert_norm`."""
    assert form(SHAPES) == split_form("experts", 4, 6, 5) == form(SHAPES, has_post_expert_norm=False)
    assert form(SHAPES, is_concatenated=None, has_gate=None, has_bias=None) == form(SHAPES)


def test_experts_without_a_gate_have_two_projections():
    found = form({"up_proj": (4, 6, 5), "down_proj": (4, 5, 6)}, has_gate=False)
    assert found is not None
    assert found.projections == (
        Projection("up_proj", "up_proj", 6, 5),
        Projection("down_proj", "down_proj", 5, 6, shard_dim=1),
    )


def test_gate_and_up_that_alternate_stay_in_one_projection():
    found = form(SHAPES, is_concatenated=False)
    assert found is not None and found.interleaved and not found.transposed
    assert [projection.name for projection in found.projections] == ["gate_up_proj", "down_proj"]


BIASES = {"gate_up_proj_bias": (4, 12), "down_proj_bias": (4, 5)}


@pytest.mark.parametrize(
    ("shapes", "marks"),
    [
        pytest.param(SHAPES, {"is_transposed": None}, id="no mark"),
        pytest.param(SHAPES, {"has_post_expert_norm": True}, id="a norm after each expert"),
        pytest.param(SHAPES | BIASES, {"has_bias": True}, id="a bias on gate and up that are apart"),
        pytest.param(SHAPES | BIASES, {}, id="biases without a mark"),
        pytest.param(SHAPES | {"scale": (4,)}, {}, id="another parameter"),
        pytest.param({"gate_up_proj": (4, 12, 5)}, {}, id="no down"),
        pytest.param(SHAPES | {"down_proj": (3, 5, 6)}, {}, id="another number of experts"),
        pytest.param(SHAPES | {"down_proj": (4, 6, 5)}, {}, id="dims that do not fit"),
        pytest.param(SHAPES | {"gate_up_proj": (4, 6, 5)}, {}, id="gate only"),
        pytest.param(SHAPES, {"is_transposed": True}, id="not transposed"),
    ],
)
def test_other_forms_are_not_taken_for_this_one(shapes, marks):
    assert form(shapes, **marks) is None


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_put_together_from_its_own_sources(moe_of, family, form):
    """Each projection of each expert, from the checkpoint in either form, equals transformers' own parameter's part."""
    folder = Path(moe_of(family, form))
    tensors, own = read_all(folder), read_all(Path(moe_of(family, "fused")))
    description = split(folder, tensors)
    assert not description.missing and not description.unexpected
    assert all("*" not in name or name.endswith(("weight", "bias")) for name in description.params)
    for module, experts in description.experts.items():
        for projection in experts.projections:
            name = f"{module}.*.{projection.name}"
            linear = description.linears[name]
            assert (linear.out_features, linear.in_features) == (projection.out_features, projection.in_features)
            assert (linear.experts, linear.transposed) == (experts.count, family in TURNED)
            whole = own[f"{module}.{projection.parameter}"]
            whole = whole.transpose(1, 2) if experts.transposed else whole
            assert description.params[f"{name}.weight"].shape == (
                experts.count,
                *whole[0, : projection.out_features].shape,
            )
            for number, sources in enumerate(by_expert(description, f"{name}.weight", tensors)):
                (source,) = sources
                assert source.component == "" and source.offset is None
                found = taken_part(source, tensors[source.tensor])
                assert found.numel() == source_numel(source, tuple(tensors[source.tensor].shape))
                expected = whole[number, projection.start : projection.start + projection.out_features]
                assert torch.equal(found.T if experts.transposed else found, expected)
            if experts.bias:
                biases = own[f"{module}.{projection.parameter}_bias"]
                for number, (source,) in enumerate(by_expert(description, f"{name}.bias", tensors)):
                    assert torch.equal(taken_part(source, tensors[source.tensor]), biases[number])


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_parameters_of_experts_are_replaced_and_no_others(moe_of, family):
    tensors = read_all(Path(moe_of(family)))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    before = describe_model(build(Path(moe_of(family)), None), shapes, {}, Problems())
    (module, *rest) = before.experts
    after = split_experts(before, [module], shapes)
    gone = {name for name in before.params if name.startswith(module)}
    assert gone and gone.isdisjoint(after.params) and gone.isdisjoint(after.sources)
    assert {
        name for name in after.params if name.startswith(f"{module}.")
    } == after.params.keys() - before.params.keys()
    assert before.params.keys() - gone == before.params.keys() & after.params.keys()
    assert [name for name in after.params if any(name.startswith(other) for other in rest)]


def spoil(moe_of: Callable[..., str], family: str, pattern: str) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint without the tensors whose names match."""
    folder = Path(moe_of(family))
    tensors = {name: value for name, value in read_all(folder).items() if not re.search(pattern, name)}
    return folder, tensors


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        (r"layers\.1\..*experts\.3\.w1", ["model.layers.1.mlp.experts.3.gate_proj.weight"]),
        (r"layers\.0\..*experts\.[07]\.w3", [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (0, 7)]),
        (r"layers\.0\..*experts\.\d\.w2", ["model.layers.0.mlp.experts.*.down_proj.weight"]),
        (
            r"layers\.1\..*experts\.5\.",
            [f"model.layers.1.mlp.experts.5.{leaf}_proj.weight" for leaf in ("gate", "up", "down")],
        ),
    ],
)
def test_experts_that_the_checkpoint_lacks_are_named(moe_of, pattern, missing):
    """A missing expert shifts no other, and all of a projection are reported as one."""
    folder, tensors = spoil(moe_of, "mixtral", pattern)
    description = split(folder, tensors)
    assert list(description.missing) == missing
    for name in [name for name in description.sources if "*" in name]:
        for number, sources in enumerate(by_expert(description, name, tensors)):
            for source in sources:
                assert f".experts.{number}." in source.tensor
            assert bool(sources) == (name.replace("*", str(number)) not in missing)


def test_bias_that_the_checkpoint_lacks_is_named(moe_of):
    folder, tensors = spoil(moe_of, "gpt-oss", r"layers\.1\.mlp\.experts\.down_proj_bias")
    assert split(folder, tensors).missing == ("model.layers.1.mlp.experts.*.down_proj.bias",)


def test_experts_beyond_the_models_own_number_fill_nothing(moe_of, tmp_path):
    """Names are mapped elsewhere, and experts beyond the model are reported there."""
    from transformers import AutoConfig

    tensors = read_all(Path(moe_of("mixtral")))
    config = AutoConfig.from_pretrained(moe_of("mixtral"))
    config.num_local_experts = 6
    config.save_pretrained(tmp_path)
    shapes, problems = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, Problems()
    description = describe_model(build(tmp_path, None), shapes, {}, problems)
    assert any("outside its shape [6, " in problem.what for problem in problems)
    found = split_experts(description, description.experts, shapes)
    assert not found.missing
    for name in [name for name in found.sources if "*" in name]:
        assert [len(sources) for sources in by_expert(found, name, tensors)] == [1] * 6


# -- stored quantized --------------------------------------------------------------------------------------------------


def test_components_of_single_experts_go_to_their_own_projection(moe_of):
    """As DeepSeek-V3's checkpoints name them; gate's and up's scales are not mixed up."""
    folder = Path(moe_of("deepseek-v3"))
    tensors = read_all(folder)
    weights = [name for name in tensors if ".experts." in name]
    tensors |= {name.replace("weight", "weight_scale_inv"): torch.ones(2, 2) for name in weights}
    description = split(folder, tensors, FP8)
    assert not description.missing and not description.unexpected and not description.parts
    for name in [name for name in description.sources if "*" in name]:
        for number, sources in enumerate(by_expert(description, name, tensors)):
            own = name.replace("*", str(number))
            scale = own.replace("weight", "weight_scale_inv")
            assert set(sources) == {Source(own), Source(scale, "weight_scale_inv")}


def in_mxfp4(tensors: dict[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """Experts' parameters as MXFP4 stores them, every byte another one in its order."""
    found = {}
    for name, value in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = value
            continue
        experts, rows, columns = value.transpose(1, 2).shape if transposed else value.shape
        found[f"{name}_blocks"] = torch.arange(experts * rows * columns // 2).view(experts, rows, columns // 32, 16)
        found[f"{name}_scales"] = torch.arange(experts * rows * columns // 32).view(experts, rows, columns // 32)
    return found


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral"])
def test_fused_components_of_four_dims_are_split_like_the_weights(moe_of, family):
    """gpt-oss keeps gate and up in one; of a model that has them apart, rows of both components are halved."""
    folder = Path(moe_of(family, "fused"))
    tensors = in_mxfp4(read_all(folder), family in TURNED)
    description = split(folder, tensors, MX)
    assert not description.missing and not description.unexpected
    for module, experts in description.experts.items():
        for projection in experts.projections:
            first, last = projection.start, projection.start + projection.out_features
            found = by_expert(description, f"{module}.*.{projection.name}.weight", tensors)
            for number, sources in enumerate(found):
                assert {source.component for source in sources} == {"", "scales"}
                for source in sources:
                    whole = tensors[source.tensor]
                    expected = whole[number, first:last]
                    assert torch.equal(taken_part(source, whole), expected)
                    assert source_numel(source, tuple(whole.shape)) == expected.numel()


def test_a_take_of_rows_counts_whole_rows():
    """Whatever the dims after them."""
    source = replace(Source("t"), take=(ROWS, 5, 8))
    assert source_numel(source, (4, 6, 10)) == 30
    assert source_numel(source, (4, 6, 5, 2)) == 30
    assert source_numel(source, (4, 6)) == 3
