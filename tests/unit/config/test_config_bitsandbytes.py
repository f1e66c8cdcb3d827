"""The two bitsandbytes configurations against transformers' own, both ways, and every error they can give."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from distquant.config import Bnb4bitConfig, Bnb8bitConfig, NoneConfig, parse, torch_dtype
from distquant.errors import InputError

CLASSES = (NoneConfig, Bnb4bitConfig, Bnb8bitConfig)
DTYPES = ["bfloat16", "float16", "float32"]

skips = st.none() | st.lists(st.sampled_from(["lm_head", "mlp.gate", r"layers\.1", "visual"]), max_size=3)
fields_4bit = st.fixed_dictionaries(
    {},
    optional={
        "bnb_4bit_quant_type": st.sampled_from(["fp4", "nf4"]),
        "bnb_4bit_use_double_quant": st.booleans(),
        "bnb_4bit_compute_dtype": st.sampled_from(DTYPES),
        "bnb_4bit_quant_storage": st.sampled_from(["uint8", *DTYPES]),
        "llm_int8_skip_modules": skips,
        "llm_int8_enable_fp32_cpu_offload": st.booleans(),
    },
)
fields_8bit = st.fixed_dictionaries(
    {},
    optional={
        "llm_int8_threshold": st.floats(0, 100),
        "llm_int8_skip_modules": skips,
        "llm_int8_enable_fp32_cpu_offload": st.booleans(),
    },
)
cases = st.one_of(
    st.tuples(st.just(Bnb4bitConfig), st.just("load_in_4bit"), fields_4bit),
    st.tuples(st.just(Bnb8bitConfig), st.just("load_in_8bit"), fields_8bit),
)


def as_transformers_writes(config):
    """transformers' dict, without the private spellings of the flags that it adds."""
    return {key: value for key, value in config.to_dict().items() if not key.startswith("_")}


@settings(deadline=None)
@given(cases)
def test_transformers_object_is_read_and_ours_is_read_back(case):
    cls, flag, fields = case
    theirs = BitsAndBytesConfig(**{flag: True}, **fields)
    ours = parse(theirs, CLASSES)
    assert ours == cls(**fields)
    assert ours.to_dict() == as_transformers_writes(theirs)
    assert BitsAndBytesConfig.from_dict(ours.to_dict()).to_dict() == theirs.to_dict()


@settings(deadline=None)
@given(cases)
def test_every_written_form_reads_back(case):
    cls, _, fields = case
    config = cls(**fields, include_modules=["mlp"], layers="0-3")
    assert cls.from_json(config.to_json()) == config
    assert parse(config.to_json(), CLASSES) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(cls(**fields, include_modules=("mlp",), layers="0-3"))
    plain = cls(**fields)
    assert parse(plain.to_diff_dict(), CLASSES) == plain
    assert parse(json.loads(json.dumps(plain.to_dict())), CLASSES) == plain


def test_defaults_are_those_of_transformers():
    assert Bnb4bitConfig().to_dict() == as_transformers_writes(BitsAndBytesConfig(load_in_4bit=True))
    assert Bnb8bitConfig().to_dict() == as_transformers_writes(BitsAndBytesConfig(load_in_8bit=True))


def test_diff_dict_holds_only_what_differs():
    assert Bnb8bitConfig().to_diff_dict() == {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = Bnb4bitConfig(bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"], layers="1")
    changed = {"bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["lm_head"]}
    assert config.to_diff_dict() == {"quant_method": "bitsandbytes", "load_in_4bit": True, **changed}
    assert config.to_diff_dict(extras=True)["layers"] == "1"


def test_our_own_options_are_not_written_for_transformers():
    written = Bnb4bitConfig(include_modules=("mlp",), layers="2").to_dict()
    assert not {"include_modules", "layers", "distquant"} & set(written)
    assert Bnb4bitConfig(layers="2").to_dict(extras=True)["layers"] == "2"


@pytest.mark.parametrize("spelling", [torch.bfloat16, "torch.bfloat16", "bfloat16"])
def test_dtype_spellings(spelling):
    config = Bnb4bitConfig(bnb_4bit_compute_dtype=spelling)
    assert config.bnb_4bit_compute_dtype == "bfloat16"
    assert torch_dtype(config.bnb_4bit_compute_dtype) is torch.bfloat16


def test_none_dtypes_mean_the_defaults():
    given = {"load_in_4bit": True, "bnb_4bit_compute_dtype": None, "bnb_4bit_quant_storage": None}
    assert parse(given, CLASSES) == Bnb4bitConfig()


def test_unknown_torch_dtype():
    with pytest.raises(InputError, match=r"dtype: unknown torch dtype 'bfloat61'\. Did you mean 'bfloat16'"):
        torch_dtype("bfloat61")


def test_integer_threshold_becomes_what_transformers_demands():
    threshold = Bnb8bitConfig(llm_int8_threshold=5).llm_int8_threshold
    assert threshold == 5.0
    assert type(threshold) is float


def test_historical_dict_without_quant_method_and_with_private_flags():
    given = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "transformers_version": "4.38",
    }
    assert parse(given, CLASSES) == Bnb4bitConfig(bnb_4bit_quant_type="nf4")
    assert parse({"load_in_8bit": True}, CLASSES) == Bnb8bitConfig()


def test_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        Bnb4bitConfig().bnb_4bit_quant_type = "nf4"
    with pytest.raises(TypeError, match="positional"):
        Bnb4bitConfig("nf4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bnb_4bit_quant_type": "nf5"}, r"quantization_config\.bnb_4bit_quant_type: 'nf5' .* one of 'fp4', 'nf4'"),
        ({"bnb_4bit_compute_dtype": torch.float64}, r"bnb_4bit_compute_dtype: torch\.float64 .*'bfloat16', 'float16'"),
        ({"bnb_4bit_quant_storage": "int8"}, r"bnb_4bit_quant_storage: 'int8' is not allowed\. Give one of 'uint8'"),
        ({"bnb_4bit_use_double_quant": 1}, r"bnb_4bit_use_double_quant: 1 is not allowed\. Give true or false"),
        ({"bnb_4bit_use_double_quant": None}, r"bnb_4bit_use_double_quant: None is not allowed"),
        ({"llm_int8_skip_modules": "lm_head"}, r"skip_modules: 'lm_head' .* a list \(each a string\) or null"),
        ({"llm_int8_skip_modules": [1]}, r"skip_modules: \[1\] is not allowed"),
        ({"llm_int8_skip_modules": ["(mlp"]}, r"llm_int8_skip_modules: '\(mlp' is not a regular expression"),
        ({"llm_int8_skip_modules": [""]}, r"llm_int8_skip_modules: '' matches every module"),
        ({"include_modules": []}, r"include_modules: includes no module"),
        ({"layers": "5-2"}, r"layers: '5-2': '5-2' runs backwards\. Write ranges such as '2-5,7'"),
        ({"layers": "two"}, r"layers: 'two': 'two' is neither a layer nor a range"),
        ({"llm_int8_threshold": 5.0}, r"llm_int8_threshold: invalid value 5\.0, Bnb4bitConfig takes only 6\.0"),
        ({"llm_int8_has_fp16_weight": True}, r"llm_int8_has_fp16_weight: invalid value True, "),
        ({"bnb_4bit_quant_typ": "nf4"}, r"bnb_4bit_quant_typ: is unknown .*Did you mean 'bnb_4bit_quant_type'"),
        (
            {"quux": 3},
            r"quux: is unknown \(given 3\)\. Bnb4bitConfig knows include_modules, layers, dequantize, bnb_4bit_quant",
        ),
        ({"_load_in_4bit": False}, r"_load_in_4bit: False contradicts load_in_4bit=True"),
        ({"load_in_8bit": True}, r"load_in_4bit and load_in_8bit exclude each other\. Set only one"),
    ],
)
def test_errors_of_4bit(given, message):
    with pytest.raises(InputError, match=message) as caught:
        parse({"load_in_4bit": True, **given}, CLASSES)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"llm_int8_threshold": -1}, r"llm_int8_threshold: -1\.0 is not a finite magnitude >= 0\. Give 6\.0"),
        ({"llm_int8_threshold": float("inf")}, r"llm_int8_threshold: inf is not a finite"),
        ({"llm_int8_threshold": float("nan")}, r"llm_int8_threshold: nan is not a finite"),
        ({"llm_int8_threshold": True}, r"llm_int8_threshold: True is not allowed\. Give a number"),
        ({"llm_int8_has_fp16_weight": True}, r"has_fp16_weight: True keeps the weights in 16 bits"),
        ({"bnb_4bit_quant_type": "nf4"}, r"bnb_4bit_quant_type: invalid value 'nf4', Bnb8bitConfig takes only"),
        ({"bnb_4bit_compute_dtype": torch.bfloat16}, r"bnb_4bit_compute_dtype: invalid value 'bfloat16', "),
    ],
)
def test_errors_of_8bit(given, message):
    with pytest.raises(InputError, match=message) as caught:
        parse({"load_in_8bit": True, **given}, CLASSES)
    assert len(caught.value.problems) == 1


def test_all_problems_are_reported_at_once():
    given = {
        "quant_method": "gptq",
        "bnb_4bit_quant_type": "nf5",
        "bnb_4bit_use_double_quant": "yes",
        "llm_int8_skip_modules": ["[", ""],
        "layers": "x",
        "llm_int8_threshold": 1.0,
        "typo": 1,
    }
    with pytest.raises(InputError, match=r"^8 problems:\n  1\. .*'gptq' is not 'bitsandbytes'") as caught:
        Bnb4bitConfig.from_dict(given)
    reported = {problem.where.removeprefix("quantization_config.") for problem in caught.value.problems}
    assert reported == set(given)


def test_construction_tells_all_problems_too():
    with pytest.raises(InputError, match=r"(?s)^2 problems:.*threshold.*fp16_weight"):
        Bnb8bitConfig(llm_int8_threshold=-1.0, llm_int8_has_fp16_weight=True)


def test_constructed_configs_have_no_problems():
    assert Bnb4bitConfig().problems() == []


def test_none_takes_no_selection():
    with pytest.raises(InputError, match=r"layers: '1-2' selects modules, but 'none' quantizes nothing"):
        NoneConfig(layers="1-2")
