"""Fields that a user may give beside a quantized checkpoint, method by method."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers import auto
from transformers.utils import quantization_config as theirs

from distquant.config import (
    CONFIG_CLASSES,
    AutoRoundConfig,
    AwqConfig,
    Bnb4bitConfig,
    CompressedTensorsConfig,
    FbgemmFp8Config,
    Fp8Config,
    GptqConfig,
    Mxfp4Config,
    NoneConfig,
    QuantizationConfig,
    merge,
    parse,
)
from distquant.config.resolve import resolve
from distquant.errors import InputError

SHORT = [name for cls in CONFIG_CLASSES for name in cls.short_names if name != "none"]
ONE_OF_EACH: list[QuantizationConfig] = [cls() for cls in CONFIG_CLASSES if cls.__name__ not in {
    "NoneConfig", "GptqConfig", "TorchaoConfig"}]  # fmt: skip
ONE_OF_EACH += [GptqConfig(bits=4), parse("torchao-int8", CONFIG_CLASSES)]  # type: ignore[list-item]


def by_name(config: QuantizationConfig) -> str:
    return type(config).__name__


# -- dequantize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ONE_OF_EACH, ids=by_name)
def test_dequantize_alone_is_for_every_method(checkpoint):
    user = parse({"dequantize": True}, CONFIG_CLASSES)
    assert user == NoneConfig(dequantize=True)
    merged = merge(checkpoint, user)
    assert (merged.prequantized, merged.dequantize) == (True, True)
    assert merged.config == replace(checkpoint, dequantize=True)


@pytest.mark.parametrize("checkpoint", ONE_OF_EACH, ids=by_name)
def test_dequantize_is_a_key_of_every_method(checkpoint):
    user = parse({**checkpoint.to_dict(), "dequantize": True}, CONFIG_CLASSES)
    assert user == replace(checkpoint, dequantize=True)
    assert merge(checkpoint, user).dequantize
    assert not merge(checkpoint, checkpoint).dequantize


def test_beside_dequantize_defaults_ask_for_nothing():
    checkpoint = Fp8Config(weight_block_size=None, activation_scheme="static")
    assert merge(checkpoint, Fp8Config(dequantize=True)).config == replace(checkpoint, dequantize=True)
    with pytest.raises(InputError, match=r"weight_block_size: the checkpoint has None, you gave \(64, 64\)"):
        merge(checkpoint, Fp8Config(dequantize=True, weight_block_size=(64, 64)))
    with pytest.raises(InputError, match=r"weight_block_size: the checkpoint has None, you gave \(128, 128\)"):
        merge(checkpoint, Fp8Config())


def test_a_checkpoint_that_says_so_itself_and_a_user_who_does_not():
    checkpoint = Fp8Config(dequantize=True)
    assert merge(checkpoint, None).dequantize
    assert not merge(checkpoint, Fp8Config()).dequantize  # a loading attribute, as in transformers


@pytest.mark.parametrize(
    "given",
    [
        lambda: theirs.Mxfp4Config(dequantize=True),
        lambda: theirs.FineGrainedFP8Config(dequantize=True),
        lambda: theirs.CompressedTensorsConfig(dequantize=True),
        lambda: theirs.CompressedTensorsConfig(run_compressed=False),
        lambda: theirs.MetalConfig(dequantize=True),
    ],
)
def test_objects_of_transformers_keep_it_though_their_dicts_do_not(given):
    user = parse(given(), CONFIG_CLASSES)
    assert user is not None and user.dequantize


def test_an_unquantized_checkpoint_has_nothing_to_dequantize():
    merged = merge(None, NoneConfig(dequantize=True))
    assert merged.config == NoneConfig() and not merged.dequantize and not merged.prequantized
    with pytest.raises(InputError, match=r"dequantize: the checkpoint is not quantized: 'fp8' with dequantize=True"):
        merge(None, Fp8Config(dequantize=True))


def test_a_method_that_nobody_knows_cannot_be_dequantized():
    model = {"quantization_config": {"quant_method": "quux"}}
    with pytest.raises(InputError, match=r"dequantize: weights quantized with 'quux' cannot be dequantized"):
        resolve(model, NoneConfig(dequantize=True), CONFIG_CLASSES, "skip")
    with pytest.raises(InputError, match="'quux' is not supported"):
        resolve(model, NoneConfig(dequantize=True), CONFIG_CLASSES)


@pytest.mark.parametrize("value", [1, "true", None])
def test_dequantize_is_a_boolean(value):
    with pytest.raises(InputError, match=r"quant_method: is missing|dequantize: .* is not allowed"):
        parse({"dequantize": value}, CONFIG_CLASSES)


# -- what is free, and what is not -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHORT)
def test_the_same_short_name_fits(name):
    config = parse(name, CONFIG_CLASSES)
    assert merge(config, parse(name, CONFIG_CLASSES)).config == config


FREE = [
    (GptqConfig(bits=4), {"backend": "marlin", "max_input_length": 4096}),
    (AwqConfig(), {"backend": "marlin", "max_input_length": 4096}),
    (AutoRoundConfig(), {"backend": "ipex"}),
    (Fp8Config(modules_to_not_convert=("a",)), {"modules_to_not_convert": ("b",), "dequantize": True}),
    (FbgemmFp8Config(), {"activation_scale_ub": 900.0}),
    (CompressedTensorsConfig(), {"use_optimized_inference": True, "dequantize": True}),
    (Mxfp4Config(), {"dequantize": True}),
]


@pytest.mark.parametrize(("checkpoint", "values"), FREE, ids=lambda value: getattr(type(value), "__name__", ""))
def test_loading_attributes_may_differ(checkpoint, values):
    assert set(values) | {"dequantize"} == checkpoint.loading_attributes | {"dequantize"}
    assert merge(checkpoint, replace(checkpoint, **values)).config == replace(checkpoint, **values)


OTHERS: list[Any] = [
    Bnb4bitConfig(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    GptqConfig(bits=8, group_size=32, damp_percent=0.2, backend="marlin"),
    GptqConfig(bits=4, desc_act=False, sym=False, format="gptq_v2"),
    AwqConfig(zero_point=False, group_size=64, modules_to_not_convert=("a",)),
    AutoRoundConfig(bits=3, sym=False, backend="a", extra_config={"lm_head": {"bits": 16}}),
    Fp8Config(weight_block_size=(64, 64), scale_fmt="ue8m0", modules_to_not_convert=("a",)),
    FbgemmFp8Config(activation_scale_ub=3.0, modules_to_not_convert=("a",)),
    Mxfp4Config(modules_to_not_convert=("a",)),
]


@pytest.mark.parametrize("user", OTHERS, ids=by_name)
def test_whatever_else_differs_is_reported_with_both_values(user):
    checkpoint = next(config for config in ONE_OF_EACH if type(config) is type(user))
    changed = {field.name for field in fields(user) if getattr(user, field.name) != getattr(checkpoint, field.name)}
    bound = changed - user.loading_attributes
    assert bound
    with pytest.raises(InputError) as caught:
        merge(checkpoint, user)
    assert len(caught.value.problems) == len(bound)
    for name in bound:
        reported = f"{name}: the checkpoint has {getattr(checkpoint, name)!r}, you gave {getattr(user, name)!r}"
        assert reported in str(caught.value)


def test_history_asks_for_nothing_at_its_default():
    checkpoint = GptqConfig(bits=4, damp_percent=0.01, dataset="c4", desc_act=True, recorded={"static_groups": False})
    user = GptqConfig(bits=4, desc_act=True)
    assert merge(checkpoint, user).config == checkpoint
    with pytest.raises(InputError, match=r"damp_percent: the checkpoint has 0\.01, you gave 0\.2"):
        merge(checkpoint, replace(user, damp_percent=0.2))
    with pytest.raises(InputError, match=r"desc_act: the checkpoint has True, you gave False") as caught:
        merge(checkpoint, GptqConfig(bits=4))
    assert len(caught.value.problems) == 1  # act_group_aware only follows


def test_groups_are_compared_by_what_they_do():
    base: dict[str, Any] = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}
    checkpoint = CompressedTensorsConfig(
        config_groups={"a": {**base, "weights": {**base["weights"], "observer": "minmax", "actorder": "static"}}},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=("lm_head",),
    )
    user = CompressedTensorsConfig(config_groups={"b": {**base, "format": "pack-quantized"}}, ignore=("lm_head",))
    assert merge(checkpoint, user).config == checkpoint
    permuted = {"a": {**base, "weights": {**base["weights"], "actorder": "group"}}}
    for other in (permuted, {"a": base | {"targets": ["re:.*"]}}, {"a": base | {"format": "int-quantized"}}):
        with pytest.raises(InputError, match="config_groups: the checkpoint has"):
            merge(checkpoint, replace(user, config_groups=other))


# -- AutoRound takes over ----------------------------------------------------------------------------------------------


def test_autoround_loads_gptq_and_awq_when_asked_to():
    merged = merge(GptqConfig(bits=4, group_size=32), AutoRoundConfig(group_size=32, backend="ipex"))
    assert merged.config == AutoRoundConfig(group_size=32, backend="ipex", packing_format="auto_round:gptq")
    awq = AwqConfig(zero_point=False, modules_to_not_convert=("lm_head",))
    user = AutoRoundConfig(packing_format="auto_round:auto_awq")
    assert merge(awq, user).config == AutoRoundConfig(
        packing_format="auto_round:awq", extra_config={"lm_head": {"bits": 16}}
    )
    with pytest.raises(InputError, match="sym: the checkpoint has False, you gave True"):
        merge(AwqConfig(), user)


@pytest.mark.parametrize(
    "checkpoint",
    [
        GptqConfig(bits=4, format="gptq_v2"),
        GptqConfig(bits=4, desc_act=True),
        GptqConfig(bits=4, meta={"quantizer": "gptqmodel"}),
        AwqConfig(format="gemv"),
        Fp8Config(),
    ],
)
def test_autoround_does_not_load_others(checkpoint):
    with pytest.raises(InputError, match=r"the checkpoint is quantized with \w+ .*, you gave AutoRoundConfig"):
        merge(checkpoint, AutoRoundConfig())
    with pytest.raises(InputError, match=r"quantized with AutoRoundConfig .*, you gave \w+"):
        merge(AutoRoundConfig(), checkpoint)


# -- the page that documents it ----------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
OWN = {"fp8", "mxfp8", "compressed-tensors", "gguf", "mxfp4", "metal"}
"""Methods whose class in transformers has a field `dequantize`."""


def documented() -> dict[str, tuple[set[str], str]]:
    """Method -> free fields and the word for `dequantize`, from the table of merge rules."""
    _, _, after = PAGE.read_text(encoding="utf-8").partition("| method | free |")
    rows = [line.strip("|").split("|") for line in after.partition("\n\n")[0].splitlines()[2:]]
    return {row[0].strip(): (set(re.findall(r"`(\w+)`", row[1])), row[3].strip()) for row in rows}


def test_the_table_of_merge_rules_is_that_of_the_classes():
    kinds = {"Bnb4bitConfig": "bitsandbytes 4-bit", "Bnb8bitConfig": "bitsandbytes 8-bit"}
    rules = {
        kinds.get(cls.__name__, cls.quant_method): (
            set(cls.loading_attributes),
            "own" if cls.quant_method in OWN else "here",
        )
        for cls in CONFIG_CLASSES
        if cls is not NoneConfig
    }
    assert documented() == rules


def test_the_methods_with_a_field_of_their_own_are_those_of_transformers():
    classes = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert {name for name, cls in classes.items() if "dequantize" in inspect.signature(cls).parameters} == OWN


def test_the_page_lists_every_short_name():
    _, _, after = PAGE.read_text(encoding="utf-8").partition("## Short names")
    names = re.findall(r"`([\w-]+)`", " ".join(line.split("|")[1] for line in after.splitlines() if line[:3] == "| `"))
    assert set(names) >= {"none", *SHORT}
