"""Selection of modules; skipping is compared with transformers' own function."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from distquant.config import ModuleSelection
from distquant.config.selection import layer_of, parse_layers

words = st.sampled_from(
    ["model", "layers", "layer", "1", "11", "2", "mlp", "gate", "gate_proj", "lm_head", "fc1", "xfc1"]
)
names = st.lists(words, min_size=1, max_size=5).map(".".join)
tokens = words | st.sampled_from([".", r"\.", ".*", "layers.1", "1|mlp", "[0-9]+", "proj", "e", "mlp.gate", "$", "^"])
patterns = st.lists(tokens, min_size=1, max_size=4).map("".join) | names

LLAMA = [
    *(f"model.layers.{i}.{leaf}" for i in range(4) for leaf in ("self_attn.q_proj", "mlp.gate_proj")),
    "lm_head",
]


@settings(max_examples=500, deadline=None)
@given(names, st.none() | st.lists(patterns, max_size=3))
@example("layer.11.attn", ["layer.1"])
@example("layer.11.attn", ["layer.*"])
@example("mlp.gate_proj", ["mlp.gate"])
@example("model.decoder.layers.23.fc1", ["fc1"])
@example("model.lm_head", [""])
@example("layers.11.mlp", ["layers."])
def test_skipping_equals_transformers(name, skip):
    expected = should_convert_module(name, skip)
    assert ModuleSelection(skip=None if skip is None else tuple(skip)).selects(name) == expected
    if skip is not None:  # including is matched the same way, so it is the exact opposite
        assert ModuleSelection(include=tuple(skip)).selects(name) != expected


def test_include_layers_and_skip_all_hold():
    selection = ModuleSelection(skip=("q_proj",), include=("model.layers",), layers="1-2")
    assert [name for name in LLAMA if selection.selects(name)] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.2.mlp.gate_proj",
    ]


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.3.mlp.experts.5.up", 3), ("transformer.h.10.attn", 10), ("lm_head", None), ("conv2.x", None)],
)
def test_the_layer_is_the_first_integer(name, layer):
    assert layer_of(name) == layer
    assert ModuleSelection(layers="3,9-10").selects(name) == (layer is not None)
    assert not ModuleSelection(layers="4-8,11").selects(name)


def test_layer_ranges():
    assert parse_layers("0-3, 30 - 31,7") == ((0, 3), (30, 31), (7, 7))
    for wrong in ("", "1-", "-1", "1,,2", "a", "3-1", "²"):
        with pytest.raises(ValueError, match=r"neither a layer|backwards"):
            parse_layers(wrong)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (ModuleSelection(skip=("lm_heads",)), "skipped modules: 'lm_heads' matches no module. Did you mean 'lm_head'?"),
        (ModuleSelection(include=("model.layers.1.mlp.gate_prj",)), "'model.layers.*.mlp.gate_proj'"),
        (ModuleSelection(include=("mlp",)), "'mlp' matches no module. Did you mean '.*mlp'?"),
        (ModuleSelection(include=("zzz",)), "'zzz' matches no module. Name a module of this model, or remove it."),
        (ModuleSelection(layers="1,2-4"), "layers: 2-4 reaches beyond the model. This model's layers are 0 to 3."),
        (ModuleSelection(layers="9"), "layers: 9 reaches beyond the model."),
    ],
)
def test_what_matches_nothing_is_reported(selection, message):
    (problem,) = selection.unmatched(LLAMA)
    assert message in str(problem)


def test_what_matches_is_not_reported():
    assert ModuleSelection(skip=("lm_head", ".*mlp"), include=("model",), layers="0-3").unmatched(iter(LLAMA)) == []
    (problem,) = ModuleSelection(layers="0").unmatched(["lm_head"])
    assert "no numbered layers" in str(problem)
