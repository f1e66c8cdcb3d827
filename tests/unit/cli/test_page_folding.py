"""Folding joins what is equal, and hides nothing: every tensor and every rank is in exactly one group."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distquant as dq
from distquant.cli.page.folding import TensorGroup, fold_layers, fold_ranks, fold_tensors, numbered, ranges
from distquant.model.description import Source
from distquant.planning import LoadPlan
from distquant.planning.load_plan import TensorPlan

FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def labels(groups: Iterable[TensorGroup]) -> dict[str, list[str]]:
    """Pattern -> the labels of its groups."""
    found: dict[str, list[str]] = {}
    for group in groups:
        found.setdefault(group.pattern, []).append(group.label)
    return found


def check_nothing_is_hidden(plan: LoadPlan) -> None:
    """Checks that groups name each tensor once, and that layers and ranks are in one kind and one group each."""
    groups = fold_tensors(plan)
    named = Counter(name for group in groups for name in group.names())
    assert named == Counter(tensor.name for tensor in plan.tensors)
    assert [group.count for group in groups] == [len(list(group.names())) for group in groups]
    for stack in fold_layers(groups):
        layers = [layer for kind in stack.kinds for layer in kind.layers]
        assert len(layers) == len(set(layers))
        of_stack = [group for group in groups if group.numbers and group.pieces[0] == stack.path]
        assert set(layers) == {layer for group in of_stack for layer in group.numbers[0]}
        for kind in stack.kinds:
            assert [group for group in of_stack if kind.layers[0] in group.numbers[0]] == list(kind.groups)
            assert all(set(kind.layers) <= set(group.numbers[0]) for group in kind.groups)
    ranks = Counter(rank for group in fold_ranks(plan) for rank in group.ranks)
    assert ranks == Counter(range(plan.mesh.size))


@pytest.fixture(scope="module")
def tiny(kjv_tiny: str) -> LoadPlan:
    return dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=2")


def changed(plan: LoadPlan, name: str, **differs: object) -> LoadPlan:
    """The plan, with one tensor changed."""
    tensors = (dataclasses.replace(t, **differs) if t.name == name else t for t in plan.tensors)
    return dataclasses.replace(plan, tensors=tuple(tensors))


def test_equal_layers_are_one_kind(tiny: LoadPlan) -> None:
    check_nothing_is_hidden(tiny)
    groups = fold_tensors(tiny)
    assert labels(groups)["model.layers.*.mlp.down_proj.weight"] == ["layers 0-3"]
    assert labels(groups)["lm_head.weight"] == [""]
    (stack,) = fold_layers(groups)
    assert [kind.layers for kind in stack.kinds] == [(0, 1, 2, 3)]
    assert stack.common == stack.kinds[0].groups


def test_a_skipped_module_stays_apart(kjv_tiny: str) -> None:
    config = {**FOUR_BIT, "llm_int8_skip_modules": ["model.layers.2.mlp.down_proj", "lm_head"]}
    plan = dq.plan(kjv_tiny, quantization_config=config, mesh="tp=2")
    check_nothing_is_hidden(plan)
    groups = labels(fold_tensors(plan))
    assert groups["model.layers.*.mlp.down_proj.weight"] == ["layers 0-1, 3"]
    assert groups["model.layers.2.mlp.down_proj.weight"] == ["layer 2"]
    (stack,) = fold_layers(fold_tensors(plan))
    assert [kind.layers for kind in stack.kinds] == [(0, 1, 3), (2,)]


def test_dense_layers_stay_apart_from_layers_of_experts(moe_of: Callable[..., str]) -> None:
    plan = dq.plan(moe_of("deepseek-v3"), mesh="ep=2,tp=2")
    check_nothing_is_hidden(plan)
    groups = labels(fold_tensors(plan))
    assert groups["model.layers.0.mlp.gate_proj.weight"] == ["layer 0"]
    assert groups["model.layers.*.mlp.experts.*.gate_proj.weight"] == ["layers 1-2"]
    assert groups["model.layers.*.self_attn.q_a_proj.weight"] == ["layers 0-2"]
    (stack,) = fold_layers(fold_tensors(plan))
    assert [kind.layers for kind in stack.kinds] == [(0,), (1, 2)]


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "differs",
    [
        {"shape": (385, 128)},
        {"dtype": "float16"},
        {"scheme": "none"},
        {"sources": (Source("model.layers.0.mlp.up_proj.weight"),)},
        {"sources": (Source(NAME, "absmax"),)},
        {"sources": (Source(NAME, "", (0, 4)),)},
        {"sources": (Source(NAME, "", None, (0, 0, 8)),)},
        {"sources": (Source(NAME), Source(NAME, "absmax"))},
        {"shard_dim": 1},
        {"partition": None},
        {"transposed": True},
        {"reading": "scatter"},
        {"experts": "cut0"},
    ],
    ids=str,
)
def test_a_tensor_that_differs_in_any_field_stays_apart(tiny: LoadPlan, differs: dict[str, object]) -> None:
    fields = {field.name for field in dataclasses.fields(TensorPlan)}
    assert fields >= set(differs)
    plan = changed(tiny, NAME, **differs)
    check_nothing_is_hidden(plan)
    groups = labels(fold_tensors(plan))
    assert groups[NAME] == ["layer 1"]
    assert groups["model.layers.*.mlp.up_proj.weight"] == ["layers 0, 2-3"]


def test_every_field_of_a_tensor_counts() -> None:
    """A new field of `TensorPlan` needs a case above, and its place in `folding`."""
    tested = {"shape", "dtype", "scheme", "sources", "shard_dim", "partition", "transposed", "reading", "experts"}
    assert {field.name for field in dataclasses.fields(TensorPlan)} == tested | {"name"}


def test_what_the_plan_has_elsewhere_counts_too(tiny: LoadPlan, kjv_tiny: str) -> None:
    module = NAME.removesuffix(".weight")
    up = "model.layers.*.mlp.up_proj.weight"
    less = dataclasses.replace(tiny, converted=tuple(name for name in tiny.converted if name != module))
    assert labels(fold_tensors(less))[up] == ["layers 0, 2-3"]
    style = dataclasses.replace(tiny.modules[module], style="colwise_gather")
    other = dataclasses.replace(tiny, modules={**tiny.modules, module: style})
    assert labels(fold_tensors(other))[up] == ["layers 0, 2-3"]
    tied = dataclasses.replace(tiny, tied={"model.extra.weight": NAME})
    assert labels(fold_tensors(tied))[up] == ["layers 0, 2-3"]
    attention = "model.layers.3.self_attn"
    wider = dataclasses.replace(tiny.attentions[attention], head_dim=1)
    heads = dataclasses.replace(tiny, attentions={**tiny.attentions, attention: wider})
    assert labels(fold_tensors(heads))["model.layers.*.self_attn.q_proj.weight"] == ["layers 0-2"]
    placed = dq.plan(kjv_tiny, device_map={"": "cuda:0", "model.layers.3": "cuda:1"})
    check_nothing_is_hidden(placed)
    assert labels(fold_tensors(placed))[up] == ["layers 0-2"]


def test_equal_partitions_of_two_keys_are_equal(tiny: LoadPlan) -> None:
    tensor = next(t for t in tiny.tensors if t.name == NAME)
    assert tensor.partition is not None
    plan = dataclasses.replace(tiny, partitions={**tiny.partitions, "copy": tiny.partitions[tensor.partition]})
    plan = changed(plan, NAME, partition="copy")
    assert labels(fold_tensors(plan))["model.layers.*.mlp.up_proj.weight"] == ["layers 0-3"]


def bare(names: Iterable[str], tiny: LoadPlan) -> LoadPlan:
    """A plan of equal tensors with these names."""
    tensors = tuple(TensorPlan(name, (4,), "bfloat16", "none", (Source(name),)) for name in names)
    return dataclasses.replace(tiny, tensors=tensors)


def test_two_numbers_are_folded_together_only_as_all_combinations(tiny: LoadPlan) -> None:
    grid = [f"m.layers.{layer}.experts.{expert}.w" for layer in range(3) for expert in range(4)]
    (group,) = fold_tensors(bare(grid, tiny))
    assert (group.pattern, group.label, group.count) == ("m.layers.*.experts.*.w", "layers 0-2, experts 0-3", 12)
    plan = bare(grid[:-1], tiny)
    check_nothing_is_hidden(plan)
    assert len(fold_tensors(plan)) == 2


def test_numbers_of_other_spellings_are_other_names(tiny: LoadPlan) -> None:
    names = ["m.7.w", "m.07.w", "m.\u0667.w", "m.7", "7.w", "m.7w", f"m.{'9' * 5000}.w", "m.-7.w", "m.8.w", ""]
    plan = bare(names, tiny)
    check_nothing_is_hidden(plan)
    assert labels(fold_tensors(plan))["m.*.w"] == ["m 7-8"]


part = st.sampled_from(["0", "1", "2", "10", "01", "*", "a", "layers", "experts"])


@given(st.sets(st.lists(part, min_size=1, max_size=5).map(".".join), max_size=40))
def test_any_names_are_in_exactly_one_group(tiny: LoadPlan, names: set[str]) -> None:
    check_nothing_is_hidden(bare(sorted(names), tiny))


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_that_keep_equally_much_are_one_group(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="dp=2,tp=2")
    assert [group.ranks for group in fold_ranks(plan)] == [(0, 1, 2, 3)]
    uneven = dq.plan(kjv_tiny, quantization_config="nf4", mesh="dp=2,tp=3")
    check_nothing_is_hidden(uneven)
    assert [group.ranks for group in fold_ranks(uneven)] == [(0, 3), (1, 4), (2, 5)]


def test_ranks_with_equal_bytes_and_other_shapes_stay_apart(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, quantization_config="nf4", mesh="tp=3")
    equal = tuple(dataclasses.replace(plan.memory[0], rank=row.rank) for row in plan.memory)
    assert [group.ranks for group in fold_ranks(dataclasses.replace(plan, memory=equal))] == [(0,), (1,), (2,)]


def test_ranks_that_read_differently_and_keep_the_same_are_one_group(kjv_tiny: str) -> None:
    plan = dq.plan(kjv_tiny, mesh="dp=2")
    memory = (plan.memory[0], dataclasses.replace(plan.memory[1], read=plan.memory[1].read + 1))
    (group,) = fold_ranks(dataclasses.replace(plan, memory=memory))
    assert (group.ranks, group.rows) == ((0, 1), memory)


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([3], "3"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8"), ([4, 2, 3], "2-4")],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_one_layer_is_not_layers() -> None:
    assert numbered("layers", [5]) == "layer 5"
    assert numbered("layers", [5, 6]) == "layers 5-6"
    assert numbered("h", [5]) == "h 5"
    assert numbered("", [5]) == "5"
