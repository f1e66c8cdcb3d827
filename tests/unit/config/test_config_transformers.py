"""Every configuration against transformers' own class: the same names and defaults, and dicts that go both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, LOADING_ATTRIBUTES_CONFIG_TYPES
from transformers.utils import quantization_config as theirs

from distquant.config import CONFIG_CLASSES, Mxfp8Config, QuantizationConfig, parse
from distquant.config.base import default_of
from distquant.config.plain import plain


def torchao(name: str, **values: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return getattr(quantization, name)(**values)


GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "strategy": "group"},
}
FP8_GROUP = {
    "targets": ["re:.*self_attn.*"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "format": "float-quantized",
}

CASES: dict[str, Callable[[], Any]] = {
    "bitsandbytes_4bit": lambda: theirs.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes_8bit": lambda: theirs.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"]),
    "gptq": lambda: theirs.GPTQConfig(bits=4),
    "gptq_changed": lambda: theirs.GPTQConfig(
        bits=3, tokenizer="a", dataset=["b"], group_size=-1, damp_percent=0.01, desc_act=True, sym=False,
        true_sequential=False, checkpoint_format="GPTQ_V2", meta={"quantizer": ["gptqmodel:2"]}, backend="MARLIN",
        model_seqlen=2048, block_name_to_quantize="model.layers", module_name_preceding_first_block=["a"],
        batch_size=2, pad_token_id=0, max_input_length=4096, cache_block_outputs=False,
    ),
    "awq": lambda: theirs.AwqConfig(),
    "awq_changed": lambda: theirs.AwqConfig(
        bits=4, group_size=64, zero_point=False, version="GEMV", backend="marlin", modules_to_not_convert=["a"]
    ),
    "auto-round": lambda: theirs.AutoRoundConfig(),
    "auto-round_changed": lambda: theirs.AutoRoundConfig(
        bits=3, group_size=-1, sym=False, backend="ipex", packing_format="auto_round:auto_gptq",
        extra_config={"lm_head": {"bits": 16}}, autoround_version="0.9.4", iters=200,
    ),
    "fp8": lambda: theirs.FineGrainedFP8Config(),
    "fp8_tensor": lambda: theirs.FineGrainedFP8Config(
        weight_block_size=None, activation_scheme="static", modules_to_not_convert=["a"], modules_to_convert=["b"],
        dequantize=True, scale_fmt="ue8m0", expert_dtype="fp4",
    ),
    "mxfp8": lambda: theirs.FineGrainedFP8Config(quant_method="mxfp8", weight_block_size=(1, 32), scale_fmt="ue8m0"),
    "mxfp8_default": lambda: theirs.FineGrainedFP8Config(quant_method="mxfp8"),
    "fbgemm_fp8": lambda: theirs.FbgemmFp8Config(),
    "fbgemm_fp8_changed": lambda: theirs.FbgemmFp8Config(activation_scale_ub=900.0, modules_to_not_convert=["a"]),
    "compressed-tensors": lambda: theirs.CompressedTensorsConfig(
        config_groups={"group_0": GROUP, "group_1": FP8_GROUP}, format="mixed-precision", ignore=["lm_head"],
        quantization_status="compressed", global_compression_ratio=1.5,
        kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "compressed-tensors_empty": lambda: theirs.CompressedTensorsConfig(),
    "torchao": lambda: theirs.TorchAoConfig(torchao("Int8WeightOnlyConfig")),
    "torchao_int4": lambda: theirs.TorchAoConfig(
        torchao("Int4WeightOnlyConfig", group_size=32), modules_to_not_convert=["a"], untie_embedding_weights=True
    ),
    "torchao_fp8": lambda: theirs.TorchAoConfig(torchao("Float8DynamicActivationFloat8WeightConfig")),
    "hqq": lambda: theirs.HqqConfig(),
    "hqq_changed": lambda: theirs.HqqConfig(nbits=3, group_size=128, view_as_float=True, axis=0, skip_modules=["a"]),
    "hqq_dynamic": lambda: theirs.HqqConfig(dynamic_config={"q_proj": {"nbits": 8, "group_size": 64}}),
    "quanto": lambda: theirs.QuantoConfig(),
    "quanto_changed": lambda: theirs.QuantoConfig("int2", "float8", ["a"]),
    "gguf": lambda: theirs.GgufConfig(),
    "gguf_changed": lambda: theirs.GgufConfig("a.gguf", dequantize=True),
    "mxfp4": lambda: theirs.Mxfp4Config(),
    "mxfp4_changed": lambda: theirs.Mxfp4Config(["a"], dequantize=True),
    "nvfp4": lambda: theirs.NVFP4Config(["a"]),
    "eetq": lambda: theirs.EetqConfig(),
    "bitnet": lambda: theirs.BitNetQuantConfig(),
    "bitnet_changed": lambda: theirs.BitNetQuantConfig(["a"], "autobitlinear", "online", True, 1e-5),
    "aqlm": lambda: theirs.AqlmConfig(),
    "aqlm_changed": lambda: theirs.AqlmConfig(16, 2, 2, 8, ["a.weight"]),
    "vptq": lambda: theirs.VptqConfig(),
    "vptq_changed": lambda: theirs.VptqConfig(
        config_for_layers={"a.b": {"in_features": 64, "vector_lens": [-1, 8]}}, shared_layer_config={"a": {"b": 1}}
    ),
    "spqr": lambda: theirs.SpQRConfig(shapes={"a.dense_weights.shape": 64}),
    "higgs": lambda: theirs.HiggsConfig(),
    "higgs_changed": lambda: theirs.HiggsConfig(2, 1, ["a"], 256, 64, {"a": {"b": [1, 2]}}),
    "fp_quant": lambda: theirs.FPQuantConfig(),
    "fp_quant_changed": lambda: theirs.FPQuantConfig("mxfp4", "quest", "mxfp8", True, None, True, "gsr", ["a"]),
    "fouroversix": lambda: theirs.FourOverSixConfig(),
    "fouroversix_changed": lambda: theirs.FourOverSixConfig(module_config_overrides={"a": {"dtype": "mxfp4"}}),
    "quark": lambda: theirs.QuarkConfig(quant_method="quark", global_quant_config={"weight": {"dtype": "int8"}}),
    "sinq": lambda: theirs.SinqConfig(),
    "sinq_changed": lambda: theirs.SinqConfig(8, 128, "2D", "ASINQ", ["a"], more=1),
    "metal": lambda: theirs.MetalConfig(),
    "metal_changed": lambda: theirs.MetalConfig(8, 32, ["a"], dequantize=True),
    "gemma": lambda: theirs.GemmaQuantizationConfig(),
    "gemma_changed": lambda: theirs.GemmaQuantizationConfig(8, True, {"vision": {"num_bits": 2}}, ["a"]),
}  # fmt: skip
"""Their objects; a name is a method's, perhaps with an ending."""

UNBUILDABLE = {"quark"}
"""Methods whose class cannot be built without a library that is not a dependency of the tests."""


def made(case: str) -> Any:
    try:
        return CASES[case]()
    except ImportError as error:
        if case not in UNBUILDABLE:
            raise
        pytest.skip(f"transformers cannot build it here: {error}")


def as_json(value: Any) -> Any:
    """With lists for tuples and strings for enum members and dtypes."""

    def text(item: Any) -> Any:
        if plain(item) is item:
            raise TypeError(f"{item!r} is no JSON")
        return plain(item)

    return json.loads(json.dumps(value, default=text))


def test_every_method_of_transformers_has_a_case():
    assert {name.partition("_changed")[0] for name in CASES} >= set(AUTO_QUANTIZATION_CONFIG_MAPPING)
    ours = {cls.quant_method for cls in CONFIG_CLASSES} - {"none"}
    assert ours == {name.removesuffix("_4bit").removesuffix("_8bit") for name in AUTO_QUANTIZATION_CONFIG_MAPPING}


@pytest.mark.parametrize("case", CASES)
def test_dicts_go_both_ways(case):
    given = made(case)
    ours = parse(given, CONFIG_CLASSES)
    assert ours is not None
    assert parse(ours.to_dict(extras=True), CONFIG_CLASSES) == ours
    assert type(ours).from_json(ours.to_json()) == ours
    written = ours.to_dict()
    assert json.loads(json.dumps(written)) == written
    back = type(given).from_dict(written)
    own = type(given).from_dict(given.to_dict())
    assert as_json(back.to_dict()) == as_json(own.to_dict())


def public(written: dict[str, Any]) -> dict[str, Any]:
    """Without the second spelling of bitsandbytes' flags."""
    return {key: value for key, value in written.items() if not key.startswith("_load_in")}


# compressed-tensors' own library fills in what a group does not say
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("compressed-tensors")])
def test_we_write_what_they_write(case):
    given = made(case)
    ours = parse(given, CONFIG_CLASSES)
    assert ours is not None
    assert public(ours.to_dict()) == public(as_json(given.to_dict()))


DEFAULT = {
    "bitsandbytes_4bit": lambda: theirs.BitsAndBytesConfig(load_in_4bit=True),
    "bitsandbytes_8bit": lambda: theirs.BitsAndBytesConfig(load_in_8bit=True),
    "compressed-tensors": lambda: theirs.CompressedTensorsConfig(),
    "nvfp4": lambda: theirs.NVFP4Config(),
    "spqr": lambda: theirs.SpQRConfig(),
}
"""Objects with defaults only, where the case of the method has others."""


@pytest.mark.parametrize("method", sorted({*AUTO_QUANTIZATION_CONFIG_MAPPING} - {"mxfp8", "quark"}))
def test_defaults_are_theirs(method):
    given = DEFAULT.get(method, CASES[method])()
    written = as_json(given.to_dict())
    ours = type(parse(given, CONFIG_CLASSES))
    required = [field.name for field in fields(ours) if default_of(field) is MISSING]
    assert required == {"gptq": ["bits"], "torchao": ["quant_type"]}.get(method, [])
    assert public(written).items() <= ours(**{name: written[name] for name in required}).to_dict().items()


def test_defaults_of_mxfp8_are_the_standards_and_not_theirs():
    assert (Mxfp8Config().weight_block_size, Mxfp8Config().scale_fmt) == ((1, 32), "ue8m0")
    given = theirs.FineGrainedFP8Config(quant_method="mxfp8")
    assert (given.weight_block_size, given.scale_fmt) == ((128, 128), "float")


@pytest.mark.parametrize("case", CASES)
def test_loading_attributes_are_theirs(case):
    given = made(case)
    ours: QuantizationConfig | None = parse(given, CONFIG_CLASSES)
    assert ours is not None
    if isinstance(given, theirs.BitsAndBytesConfig):
        assert not isinstance(given, LOADING_ATTRIBUTES_CONFIG_TYPES)  # ours lets differ what touches no stored bit
    elif isinstance(given, LOADING_ATTRIBUTES_CONFIG_TYPES):
        assert ours.loading_attributes == set(given.get_loading_attributes())
        for name, value in given.get_loading_attributes().items():
            assert as_json(getattr(ours, name)) == as_json(value), name
    else:
        assert ours.loading_attributes == frozenset()
