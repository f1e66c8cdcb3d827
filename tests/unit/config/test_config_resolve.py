"""parse, detect and merge."""

from __future__ import annotations

import pytest
from transformers import BitsAndBytesConfig

from distquant.config import Bnb4bitConfig, Bnb8bitConfig, NoneConfig, detect, merge, parse
from distquant.errors import InputError

CLASSES = (NoneConfig, Bnb4bitConfig, Bnb8bitConfig)
NF4 = Bnb4bitConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "quant_type", "double_quant"),
    [("nf4", "nf4", False), ("nf4-dq", "nf4", True), ("fp4", "fp4", False), ("fp4-dq", "fp4", True)],
)
def test_4bit_short_names(name, quant_type, double_quant):
    assert parse(name, CLASSES) == Bnb4bitConfig(
        bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype="bfloat16"
    )


def test_other_forms():
    assert parse(None, CLASSES) is None
    assert parse("none", CLASSES) == NoneConfig()
    assert parse({"quant_method": "none"}, CLASSES) == NoneConfig()
    assert parse("int8", CLASSES) == Bnb8bitConfig()
    assert parse(NF4, ()) is NF4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nf4dq", r"unknown quantization 'nf4dq'\. Did you mean 'nf4-dq'.* Known names: none, nf4, nf4-dq, fp4, "),
        ("bf16", r"unknown quantization 'bf16'\. That is a dtype: give dtype='bfloat16' \(--dtype bfloat16\)"),
        ("qqq", r"unknown quantization 'qqq'\. Known names: none, nf4, nf4-dq, fp4, fp4-dq, int8\."),
        (
            {"quant_method": "bitsnbytes"},
            r"quant_method: 'bitsnbytes' is not supported\. Did you mean 'bitsandbytes'\?",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"'gptq' is not supported\. Known methods: none, bitsandbytes\."),
        ({}, r"quantization_config\.quant_method: is missing\. Known methods: none, bitsandbytes\."),
        ({"quant_method": "bitsandbytes"}, r"which kind is meant\. Add load_in_4bit=True or load_in_8bit=True"),
        (BitsAndBytesConfig(), r"'bitsandbytes' does not say which kind is meant"),
        (4, r"4 \(int\) is not a quantization configuration\. Give a configuration object, a dict"),
        (BitsAndBytesConfig, r"\(type\) is not a quantization configuration"),
    ],
)
def test_what_cannot_be_parsed(given, message):
    with pytest.raises(InputError, match=message):
        parse(given, CLASSES)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": None, "text_config": {}}, None),
        ({"quantization_config": {"quant_method": "a"}}, {"quant_method": "a"}),
        ({"compression_config": {"quant_method": "a"}}, {"quant_method": "a"}),
        ({"text_config": {"quantization_config": {"quant_method": "a"}}}, {"quant_method": "a"}),
        ({"text_config": {"compression_config": {"quant_method": "a"}}}, {"quant_method": "a"}),
        ({"quantization_config": {"b": 1}, "text_config": {"quantization_config": {"b": 1}}}, {"b": 1}),
    ],
)
def test_detect(config, expected):
    assert detect(config) == expected


def test_detect_rejects_contradictions_and_nonsense():
    with pytest.raises(
        InputError, match=r"quantization_config: \{'b': 1\} contradicts text_config\.quantization_config"
    ):
        detect({"quantization_config": {"b": 1}, "text_config": {"quantization_config": {"b": 2}}})
    with pytest.raises(InputError, match=r"config\.json: quantization_config: holds 'nf4'"):
        detect({"quantization_config": "nf4"})


def changed(**values):
    return Bnb4bitConfig.from_dict({**NF4.to_dict(), **values})


INT8 = Bnb8bitConfig(llm_int8_skip_modules=["lm_head", "gate"])


@pytest.mark.parametrize(
    ("checkpoint", "user", "expected"),
    [
        (None, None, (NoneConfig(), False)),
        (None, NF4, (NF4, False)),
        (None, NoneConfig(), (NoneConfig(), False)),
        (NoneConfig(), NF4, (NF4, False)),
        (NF4, None, (NF4, True)),
        (NF4, NF4, (NF4, True)),
        (NF4, changed(bnb_4bit_compute_dtype="float16"), (changed(bnb_4bit_compute_dtype="float16"), True)),
        (changed(llm_int8_skip_modules=["lm_head"]), NF4, (changed(llm_int8_skip_modules=["lm_head"]), True)),
        (
            INT8,
            Bnb8bitConfig(llm_int8_threshold=4.0, llm_int8_skip_modules=["gate", "lm_head"]),
            (Bnb8bitConfig(llm_int8_threshold=4.0, llm_int8_skip_modules=["lm_head", "gate"]), True),
        ),
        (
            NF4,
            changed(llm_int8_enable_fp32_cpu_offload=True),
            (changed(llm_int8_enable_fp32_cpu_offload=True), True),
        ),
    ],
)
def test_merge(checkpoint, user, expected):
    assert merge(checkpoint, user) == expected


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (NoneConfig(), r"the checkpoint is quantized: .*'nf4'.*ask for bfloat16 with \{\'dequantize\': True\}"),
        (Bnb8bitConfig(), r"checkpoint is quantized with Bnb4bitConfig .*you gave Bnb8bitConfig .*load_in_8bit"),
        (
            changed(bnb_4bit_quant_type="fp4"),
            r"\.bnb_4bit_quant_type: the checkpoint has 'nf4', you gave 'fp4'\. Set it",
        ),
        (changed(bnb_4bit_use_double_quant=True), r"the checkpoint has False, you gave True.*bnb_4bit_compute_dtype"),
        (changed(bnb_4bit_quant_storage="bfloat16"), r"bnb_4bit_quant_storage: the checkpoint has 'uint8', you gave"),
        (changed(llm_int8_skip_modules=["a"]), r"skip_modules: the checkpoint has None, you gave \('a',\)"),
        (changed(layers="1-2"), r"layers: the checkpoint has None, you gave '1-2'"),
    ],
)
def test_conflicts(user, message):
    with pytest.raises(InputError, match=message) as caught:
        merge(NF4, user)
    assert len(caught.value.problems) == 1


def test_all_conflicts_at_once():
    with pytest.raises(InputError, match=r"(?s)2 problems.*quant_type.*double_quant"):
        merge(NF4, Bnb4bitConfig(bnb_4bit_use_double_quant=True))
