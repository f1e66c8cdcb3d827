"""Precisions of configurations, in the terms that all methods share."""

from __future__ import annotations

import pytest

from distquant.config import (
    CONFIG_CLASSES,
    AqlmConfig,
    AutoRoundConfig,
    CompressedTensorsConfig,
    GemmaConfig,
    GptqConfig,
    HqqConfig,
    Precision,
    QuarkConfig,
    TorchaoConfig,
    parse,
)
from distquant.config.vocabulary import columns

SHORT = [name for cls in CONFIG_CLASSES for name in cls.short_names]


def test_the_short_names_that_the_design_lists():
    assert SHORT == [
        "none", "nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "gptq-rtn", "gptq-rtn-g64", "gptq-rtn-g32", "awq-rtn",
        "awq-rtn-g64", "awq-rtn-g32", "int4", "int4-g64", "int4-g32", "fp8-row", "fp8", "fp8-tensor", "mxfp8", "mxfp4",
        "fbgemm_fp8", "quanto-int8", "quanto-int4", "torchao-int8", "torchao-int4", "torchao-fp8", "hqq", "hqq-g128",
        "hqq-g32", "nvfp4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "weight", "bits", "group", "symmetric", "scale_dtype", "double_quant", "activations"),
    [
        ("nf4", "nf4", 4, 64, True, "float32", False, None),
        ("fp4-dq", "fp4", 4, 64, True, "uint8", True, None),
        ("int8", "int8", 8, "row", True, "float32", False, "dynamic"),
        ("gptq-rtn", "int4", 4, 128, True, "float16", False, None),
        ("gptq-rtn-g64", "int4", 4, 64, True, "float16", False, None),
        ("awq-rtn-g32", "uint4", 4, 32, False, "float16", False, None),
        ("int4-g64", "int4", 4, 64, True, None, False, None),
        ("hqq-g128", "uint4", 4, 128, False, None, False, None),
        ("awq-rtn", "uint4", 4, 128, False, "float16", False, None),
        ("fp8", "float8_e4m3fn", 8, (128, 128), True, "float32", False, "dynamic"),
        ("fp8-tensor", "float8_e4m3fn", 8, "tensor", True, "float32", False, "dynamic"),
        ("fp8-row", "float8_e4m3fn", 8, "row", True, None, False, "dynamic"),
        ("mxfp8", "float8_e4m3fn", 8, 32, True, "float8_e8m0fnu", False, "dynamic"),
        ("fbgemm_fp8", "float8_e4m3fn", 8, "row", True, "float32", False, "dynamic"),
        ("int4", "int4", 4, 128, True, None, False, None),
        ("torchao-int8", "int8", 8, "row", True, None, False, None),
        ("torchao-int4", "int4", 4, 128, False, None, False, None),
        ("torchao-fp8", "float8_e4m3fn", 8, "row", True, None, False, None),
        ("hqq", "uint4", 4, 64, False, None, False, None),
        ("quanto-int8", "int8", 8, "row", True, None, False, None),
        ("quanto-int4", "uint4", 4, 128, False, None, False, None),
        ("mxfp4", "float4_e2m1fn", 4, 32, True, "float8_e8m0fnu", False, None),
        ("nvfp4", "float4_e2m1fn", 4, 16, True, "float8_e4m3fn", True, "dynamic"),
    ],
)
def test_precision_of_short_names(name, weight, bits, group, symmetric, scale_dtype, double_quant, activations):
    config = parse(name, CONFIG_CLASSES)
    assert config is not None
    (found,) = config.vocabulary()
    assert (found.weight, found.bits, found.group, found.symmetric) == (weight, bits, group, symmetric)
    assert (found.scale_dtype, found.double_quant, found.activations) == (scale_dtype, double_quant, activations)


def test_nothing_is_quantized():
    config = parse("none", CONFIG_CLASSES)
    assert config is not None and config.vocabulary() == ()


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_outliers_of_int8(threshold):
    (found,) = parse({"load_in_8bit": True, "llm_int8_threshold": threshold}, CONFIG_CLASSES).vocabulary()  # type: ignore[union-attr]
    assert found.outlier_threshold == (threshold or None)


def test_several_groups_of_compressed_tensors():
    config = CompressedTensorsConfig(
        config_groups={
            "a": {
                "targets": ["re:.*attn.*"],
                "weights": {"num_bits": 8, "strategy": "channel"},
                "format": "int-quantized",
            },
            "b": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
                "input_activations": {"num_bits": 8, "strategy": "tensor"},
            },
            "c": {"targets": ["Embedding"]},
        },
        format="pack-quantized",
        ignore=("lm_head",),
    )
    assert config.vocabulary() == (
        Precision(
            weight="int8", bits=8, group="row", symmetric=True, modules=("re:.*attn.*",), excluded=("lm_head",)
        ),
        Precision(
            weight="uint4", bits=4, group=32, symmetric=False, storage_dtype="int32", activations="static",
            modules=("Linear",), excluded=("lm_head",),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "args", "group"),
    [
        ({}, "tensor", "tensor"),
        ({"group_size": -1}, "channel", "row"),
        ({"group_size": 64}, "group", 64),
        ({"strategy": "block", "block_structure": "64x32"}, "block", (64, 32)),
        ({"strategy": "token", "dynamic": True}, "token", "row"),
    ],
)
def test_the_strategy_follows_from_the_group(given, args, group):
    """As `compressed_tensors` infers it, which the second half asks."""
    config = CompressedTensorsConfig(config_groups={"a": {"targets": ["Linear"], "weights": given}})
    weights = config.groups["a"].weights
    assert weights is not None
    assert (weights.scope, weights.group) == (args, group)
    quantization = pytest.importorskip("compressed_tensors.quantization")
    assert quantization.QuantizationArgs(**given).strategy == args


def test_modules_and_bits_of_others():
    (gptq,) = GptqConfig(bits=4, group_size=-1, sym=False, dynamic={"-:.*a": {}, "+:b": {"bits": 8}}).vocabulary()
    assert (gptq.weight, gptq.group, gptq.excluded) == ("uint4", "row", (".*a",))
    (auto,) = AutoRoundConfig(bits=4, extra_config={"a": {"bits": 16}, "b": {"bits": 8}}, act_bits=8).vocabulary()
    assert (auto.excluded, auto.activations) == (("a",), "dynamic")
    first, second = HqqConfig(dynamic_config={"a": {"nbits": 8}, "b": {"nbits": 3}}).vocabulary()
    assert [(p.modules, p.bits, p.storage_dtype) for p in (first, second)] == [
        (("a",), 8, "uint8"),
        (("b",), 3, "int32"),
    ]
    assert AqlmConfig(num_codebooks=1, nbits_per_codebook=16, in_group_size=8).vocabulary()[0].bits == 2
    assert [p.bits for p in GemmaConfig(module_quant_configs={"a": {"num_bits": 2}, "b": {}}).vocabulary()] == [2, 4, 4]
    (quark,) = QuarkConfig(global_quant_config={"weight": [{"dtype": "int8", "qscheme": "per_channel"}]}).vocabulary()
    assert (quark.weight, quark.bits, quark.group) == ("int8", 8, "row")
    assert QuarkConfig().vocabulary() == ()


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("Int8WeightOnlyConfig", {}, ("int8", "row", True, None)),
        ("Int8DynamicActivationInt8WeightConfig", {}, ("int8", "row", True, "dynamic")),
        ("Float8DynamicActivationFloat8WeightConfig", {}, ("float8_e4m3fn", "tensor", True, "dynamic")),
        ("Int4WeightOnlyConfig", {"group_size": 64}, ("int4", 64, False, None)),
        ("Float8DynamicActivationInt4WeightConfig", {}, ("int4", None, True, "dynamic")),
        ("IntxWeightOnlyConfig", {}, ("int8", "row", True, None)),
        ("Int8DynamicActivationIntxWeightConfig", {}, ("int8", 32, True, "dynamic")),
    ],
)
def test_torchao_configurations(name, values, expected):
    quantization = pytest.importorskip("torchao.quantization")
    given = {"quant_method": "torchao", "quant_type": getattr(quantization, name)(**values)}
    (found,) = TorchaoConfig.from_dict(given).vocabulary()
    assert (found.weight, found.group, found.symmetric, found.activations) == expected


def test_torchao_by_module():
    quantization = pytest.importorskip("torchao.quantization")
    configs = {"re:.*attn.*": quantization.Int8WeightOnlyConfig(), "re:.*mlp.*": quantization.Int4WeightOnlyConfig()}
    given = quantization.FqnToConfig({**configs, "lm_head": None})
    found = TorchaoConfig.from_dict({"quant_type": given}).vocabulary()
    assert [(p.modules, p.weight) for p in found] == [(("re:.*attn.*",), "int8"), (("re:.*mlp.*",), "int4")]


def test_columns_that_say_nothing_are_left_out():
    header, rows = columns([
        Precision(weight="int8", bits=8, group=(1, 32), excluded=("a", "b", "c", "d")),
        Precision(weight="codebook", bits=1.5, symmetric=True, excluded=()),
    ])  # fmt: skip
    assert header == ["weight", "bits", "group", "symmetric", "excluded"]
    assert rows == [
        ["int8", "8", "1x32", "-", "a, b, c, ... (4)"],
        ["codebook", "1.5", "-", "yes", "none"],
    ]
    assert columns([]) == ([], [])
