"""A checkpoint's own configuration: words of other tools, keys that nobody here knows, and keys that change meaning."""

from __future__ import annotations

from typing import Any

import pytest

from distquant.config import (
    CONFIG_CLASSES,
    AwqConfig,
    Bnb4bitConfig,
    CompressedTensorsConfig,
    Fp8Config,
    GptqConfig,
    QuantizationConfig,
    detect,
    parse,
)
from distquant.config.evidence import CHANGES_MEANING
from distquant.errors import InputError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "packing_format": "auto_round:auto_gptq"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
GROUP = {"targets": ["Linear"], "weights": W4, "format": "pack-quantized"}
CT = {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}, "format": "pack-quantized"}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
HQQ = {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1, "channel_wise": True}}


def stored(config: dict[str, Any]) -> QuantizationConfig:
    """Reads a configuration as that of a checkpoint."""
    own = detect({"quantization_config": config})
    read = parse(own, CONFIG_CLASSES, stored=True)
    assert read is not None
    return read


UNKNOWN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # what the file adds, by tools: GPTQModel 7, AutoRound's exports, llm-compressor, ModelOpt, unsloth, torchao
    (GPTQ, {"offload_policy": "auto", "gc_mode": "interval", "wait_for_submodule_finalizers": False}),
    (GPTQ, {"provider": "auto-round", "autoround_version": "0.9.2", "iters": 0, "data_type": "int"}),
    (GPTQ, {"fallback": {"strategy": "rtn"}, "moe": None, "dense_vram_strategy": "exclusive"}),
    (AWQ, {"provider": "auto-round", "nsamples": 128, "seqlen": 2048}),
    (AWQ, {"lm_head": False, "meta": {"quantizer": ["gptqmodel:6.0.3"]}, "act_group_aware": False}),
    (AUTO_ROUND, {"static_attention_dtype": None, "act_max": {}, "to_quant_block_names_version": 2}),
    (FP8, {"provider": "vllm", "model_free": True, "quantizer": "llm-compressor"}),
    (FP8, {"static_kv_granularity": "tensor"}),
    (CT, {"provider": "auto-round", "model_free": True, "static_kv_granularity": "tensor"}),
    (BNB4, {"unsloth_fixed": True, "bnb_4bit_target_parameters": []}),
    (BNB8, {"some_note": "text", "quantized_by": {"name": "a tool"}}),
    ({"quant_method": "quanto", "weights": "int8"}, {"quanto_version": "0.2.7"}),
    ({"quant_method": "hqq", "quant_config": HQQ}, {"hqq_version": "0.2.8"}),
    ({"quant_method": "mxfp4"}, {"provider": "quark", "version": 3}),
    ({"quant_method": "fbgemm_fp8"}, {"modelopt_version": "0.44"}),
]


@pytest.mark.parametrize(("config", "more"), UNKNOWN)
def test_unknown_keys_of_a_checkpoint_are_kept_and_named(config: dict[str, Any], more: dict[str, Any]) -> None:
    plain, read = stored(config), stored({**config, **more})
    declared = {name for name in more if hasattr(plain, name) or name in plain.record_keys}
    assert set(read.unused_keys) == set(more) - declared
    written = read.to_dict()
    assert {key: written[key] for key in more if key not in declared} == {
        key: value for key, value in more.items() if key not in declared
    }
    # A plan carries the configuration to other processes in this form.
    assert parse(written, CONFIG_CLASSES, stored=True) == read
    with pytest.raises(InputError, match="is unknown"):
        parse({**config, **more}, CONFIG_CLASSES)


def test_unknown_keys_inside_of_groups_are_kept_in_their_place() -> None:
    group = {**GROUP, "weights": {**W4, "hysteresis": 3}, "note": "x"}
    config = {**CT, "config_groups": {"group_0": group}}
    read = stored(config)
    assert isinstance(read, CompressedTensorsConfig)
    assert read.unused_keys == ("config_groups.group_0.note", "config_groups.group_0.weights.hysteresis")
    assert read.groups == stored(CT).groups  # type: ignore[attr-defined]
    assert read.to_dict()["config_groups"]["group_0"] == group
    assert parse(read.to_dict(), CONFIG_CLASSES, stored=True) == read
    with pytest.raises(InputError, match=r"config_groups\.group_0\.note: is unknown"):
        parse(config, CONFIG_CLASSES)


def torchao(name: str, **data: Any) -> dict[str, Any]:
    """A configuration as torchao serializes it."""
    return {"_type": name, "_version": 2, "_data": data}


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({**GPTQ, "method": "gptq"}, GPTQ),
    ({**GPTQ, "quant_method": "gptq_marlin"}, GPTQ),
    ({**{key: value for key, value in GPTQ.items() if key != "quant_method"}, "method": "gptqmodel"}, GPTQ),
    ({**GPTQ, "checkpoint_format": "gptq_marlin"}, GPTQ),
    ({**GPTQ, "format": "EXLLAMA"}, GPTQ),
    (
        {"quant_method": "gptq", "wbits": 4, "groupsize": 64, "actorder": True},
        {**GPTQ, "group_size": 64, "desc_act": True},
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "act_order": True, "symmetric": True},
        {**GPTQ, "desc_act": True},
    ),
    ({**GPTQ, "desc_act": None, "backend": None}, GPTQ),
    ({**AWQ, "method": "awq"}, AWQ),
    ({**AWQ, "version": "exllama"}, AWQ),
    ({**AWQ, "version": "ipex"}, AWQ),
    ({**AWQ, "quant_method": "awq_marlin"}, AWQ),
    ({**AUTO_ROUND, "quant_method": "auto_round"}, AUTO_ROUND),
    ({**FP8, "fmt": "float8_e4m3fn"}, {**FP8, "fmt": "e4m3"}),
    ({**FP8, "fmt": "E4M3FN"}, {**FP8, "fmt": "e4m3"}),
    ({**FP8, "scale_fmt": "e8m0"}, {**FP8, "scale_fmt": "ue8m0"}),
    ({**CT, "quant_method": "compressed_tensors"}, CT),
    (
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
        },
    ),
    (
        {"quant_method": "torchao", "quant_type": "int4_weight_only", "quant_type_kwargs": {"group_size": 64}},
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 64}}},
        },
    ),
    (
        {"quant_method": "torchao", "quant_type": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}},
        {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}}},
        },
    ),
]


@pytest.mark.parametrize(("config", "usual"), SAME)
def test_words_of_other_tools_mean_the_usual_ones(config: dict[str, Any], usual: dict[str, Any]) -> None:
    assert stored(config) == stored(usual)


@pytest.mark.parametrize("key", ["groupsize", "actorder", "method", "provider"])
def test_a_user_is_held_to_the_usual_words(key: str) -> None:
    with pytest.raises(InputError, match=rf"quantization_config\.{key}: is unknown"):
        parse({**GPTQ, key: 1}, CONFIG_CLASSES)


def test_a_scheme_of_the_cache_may_be_an_object() -> None:
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    read = stored({**FP8, "kv_cache_scheme": scheme})
    assert isinstance(read, Fp8Config)
    assert read.to_dict()["kv_cache_scheme"] == scheme


def test_fields_of_the_other_kind_of_bitsandbytes_are_kept() -> None:
    """Anyone who gave both to `BitsAndBytesConfig` has such a file."""
    read = stored({**BNB8, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"})
    assert read.to_dict()["bnb_4bit_quant_type"] == "nf4"
    assert stored({**BNB4, "llm_int8_threshold": 0.0}).to_dict()["llm_int8_threshold"] == 0.0
    with pytest.raises(InputError, match="exclude each other"):
        stored({**BNB4, "load_in_8bit": True})


def test_history_of_a_checkpoint_need_not_be_possible_here() -> None:
    read = stored({**GPTQ, "dataset": "NeelNanda/pile-10k", "damp_percent": 0})
    assert isinstance(read, GptqConfig)
    assert (read.dataset, read.damp_percent) == (None, 0.1)
    assert (read.to_dict()["dataset"], read.to_dict()["damp_percent"]) == ("NeelNanda/pile-10k", 0)
    assert parse(read.to_dict(), CONFIG_CLASSES, stored=True) == read
    with pytest.raises(InputError, match=r"damp_percent: 0\.0 is not between"):
        parse({**GPTQ, "damp_percent": 0}, CONFIG_CLASSES)


@pytest.mark.parametrize(
    "config",
    [{**GPTQ, "bits": "4"}, {**AWQ, "zero_point": 1.5}, {**FP8, "weight_block_size": "128"}, {**CT, "ignore": 3}],
)
def test_a_wrong_type_of_a_known_key_stays_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is not allowed"):
        stored(config)


def test_methods_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(InputError, match=r"quantization_config\.method: 'awq' contradicts quant_method='gptq'"):
        stored({**GPTQ, "method": "awq"})


@pytest.mark.parametrize("key", sorted(CHANGES_MEANING))
def test_keys_that_change_what_bytes_mean_are_errors_with_the_reason(key: str) -> None:
    with pytest.raises(InputError) as caught:
        stored({**GPTQ, key: {"some": "value"}})
    assert any(CHANGES_MEANING[key] in problem.what for problem in caught.value.problems)
    for harmless in (None, False, {}, "none"):
        stored({**GPTQ, key: harmless})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({**GPTQ, "rotation": "hadamard"}, "inputs must be rotated"),  # GPTQModel pull request 2980
        ({**AWQ, "pre_quant_scale": True}, "inputs must be scaled"),  # ModelOpt
        ({**GPTQ, "data_type": "nv_fp4"}, "codes are not integers"),
        ({**BNB4, "bnb_4bit_blocksize": 128}, "blocks of another size"),
        ({"quant_method": "hqq", "quant_config": {**HQQ, "scale_quant_params": {"nbits": 8}}}, "scales are quantized"),
        ({**CT, "config_groups": {"g": {**GROUP, "weights": {**W4, "codebook": [1]}}}}, "entries of a table"),
    ],
)
def test_such_keys_of_each_tool(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        stored(config)


def test_classes_are_those_of_the_methods() -> None:
    assert isinstance(stored({**AWQ, "quant_method": "autoawq"}), AwqConfig)
    assert isinstance(stored(BNB4), Bnb4bitConfig)
