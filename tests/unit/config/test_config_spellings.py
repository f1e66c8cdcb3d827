"""Dicts as they lie in real checkpoints, of today and of older tools."""

from __future__ import annotations

from typing import Any

import pytest

from distquant.config import (
    CONFIG_CLASSES,
    AutoRoundConfig,
    AwqConfig,
    Bnb4bitConfig,
    CompressedTensorsConfig,
    Fp8Config,
    GptqConfig,
    HqqConfig,
    Mxfp4Config,
    Mxfp8Config,
    QuantizationConfig,
    QuantoConfig,
    QuarkConfig,
    TorchaoConfig,
    detect,
    parse,
)
from distquant.errors import InputError

AUTOGPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq",
}  # fmt: skip
GPTQMODEL = {
    "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq",
    "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": {"-:.*gate.*": {}, "+:.*mlp.*": {"bits": 8}},
    "meta": {"quantizer": ["gptqmodel:2.2.0"], "uri": "https://github.com/modelcloud/gptqmodel", "damp_percent": 0.05},
}  # fmt: skip
OLD_TRANSFORMERS_GPTQ = {
    "batch_size": 1, "bits": 4, "block_name_to_quantize": "model.layers", "cache_block_outputs": True,
    "damp_percent": 0.1, "dataset": "c4", "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128,
    "max_input_length": None, "model_seqlen": 2048, "module_name_preceding_first_block": ["model.embed_tokens"],
    "modules_in_block_to_quantize": None, "pad_token_id": None, "quant_method": "gptq", "sym": True, "tokenizer": None,
    "true_sequential": True, "use_cuda_fp16": False, "use_exllama": True, "disable_exllama": False,
}  # fmt: skip
AUTOAWQ = {
    "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
    "zero_point": True,
}  # fmt: skip
OLD_AWQ = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM", "quant_method": "awq"}
DEEPSEEK_V3 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip
LLM_COMPRESSOR = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
    "format": "pack-quantized", "global_compression_ratio": 1.89, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed",
    "sparsity_config": {"format": "dense", "ignore": [], "targets": []}, "transform_config": {}, "version": "0.10.2",
}  # fmt: skip
MIXED = {
    "config_groups": {
        "group_0": {
            "format": "float-quantized",
            "targets": ["re:.*self_attn.*"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x128"},
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True,
            },
        },
        "group_1": {
            "format": "nvfp4-pack-quantized",
            "targets": ["model.layers.0.mlp.up_proj", "Linear"],
            "weights": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": None,
            },
            "input_activations": {
                "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
            },
        },
    },
    "format": "mixed-precision", "ignore": ["re:.*lm_head", "model.layers.0.mlp.gate"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
    "quant_method": "compressed-tensors", "quantization_status": "compressed",
}  # fmt: skip
AUTO_ROUND = {
    "amp": True, "autoround_version": "0.4.5", "batch_size": 8, "bits": 4, "damp_percent": 0.01, "data_type": "int",
    "enable_minmax_tuning": True, "enable_quanted_input": True, "gradient_accumulate_steps": 1, "group_size": 128,
    "iters": 200, "low_gpu_mem_usage": False, "lr": 0.005, "minmax_lr": 0.005, "nsamples": 128, "seqlen": 2048,
    "quant_method": "intel/auto-round", "scale_dtype": "torch.float16", "sym": True,
    "backend": "auto_round:gptq:exllamav2", "packing_format": "auto_round:auto_gptq", "to_quant_block_names": None,
    "extra_config": {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "float"}},
}  # fmt: skip
HQQ = {
    "quant_config": {
        "offload_meta": False, "scale_quant_params": None, "zero_quant_params": None,
        "weight_quant_params": {
            "axis": 0, "channel_wise": True, "group_size": 64, "nbits": 3, "optimize": True, "round_zero": False,
            "view_as_float": False,
        },
    },
    "quant_method": "hqq", "skip_modules": ["lm_head"],
}  # fmt: skip
TORCHAO = {
    "include_input_output_embeddings": False, "modules_to_not_convert": None, "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {"group_size": None}}},
    "untie_embedding_weights": False,
}  # fmt: skip
QUARK = {
    "algo_config": None, "exclude": ["lm_head"], "layer_quant_config": {}, "layer_type_quant_config": {},
    "export": {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_format": "real_quantized"},
    "global_quant_config": {
        "weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "symmetric": None}, "bias": None,
    },
    "quant_method": "quark", "quant_mode": "eager_mode", "softmax_quant_spec": None, "version": "0.9",
}  # fmt: skip

REAL: list[tuple[dict[str, Any], type[QuantizationConfig], dict[str, Any]]] = [
    (AUTOGPTQ, GptqConfig, {"format": "gptq", "desc_act": True, "act_group_aware": False, "damp_percent": 0.01}),
    ({**AUTOGPTQ, "is_marlin_format": True}, GptqConfig, {"format": "marlin"}),
    ({**AUTOGPTQ, "is_marlin_format": True, "checkpoint_format": None}, GptqConfig, {"format": "marlin"}),
    ({**AUTOGPTQ, "checkpoint_format": "gptq_v2"}, GptqConfig, {"format": "gptq_v2"}),
    ({**AUTOGPTQ, "checkpoint_format": "GPTQ_V2", "format": "gptq_v2"}, GptqConfig, {"format": "gptq_v2"}),
    (GPTQMODEL, GptqConfig, {"group_size": 32, "lm_head": False, "dynamic": GPTQMODEL["dynamic"]}),
    (OLD_TRANSFORMERS_GPTQ, GptqConfig, {"dataset": "c4", "round_to_nearest": False}),
    (AUTOAWQ, AwqConfig, {"format": "gemm", "zero_point": True, "round_to_nearest": True}),
    (OLD_AWQ, AwqConfig, {"format": "gemm", "group_size": 64, "bits": 4}),
    ({**AUTOAWQ, "version": "gemv", "backend": "autoawq", "do_fuse": True}, AwqConfig, {"format": "gemv"}),
    ({**AUTOAWQ, "version": "gemm", "backend": "llm-awq"}, AwqConfig, {"format": "llm-awq", "backend": "auto"}),
    (DEEPSEEK_V3, Fp8Config, {"weight_block_size": (128, 128), "fmt": "e4m3", "scale_fmt": "float"}),
    ({**DEEPSEEK_V3, "scale_fmt": "ue8m0"}, Fp8Config, {"scale_fmt": "ue8m0"}),
    (
        {
            "quant_method": "fp8",
            "activation_scheme": "STATIC",
            "weight_block_size": None,
            "ignored_layers": ["lm_head"],
        },
        Fp8Config,
        {"activation_scheme": "static", "weight_block_size": None, "modules_to_not_convert": ("lm_head",)},
    ),
    ({"quant_method": "mxfp8", "ignored_layers": ["a"]}, Mxfp8Config, {"weight_block_size": (1, 32)}),
    (LLM_COMPRESSOR, CompressedTensorsConfig, {"format": "pack-quantized", "ignore": ("lm_head",)}),
    (MIXED, CompressedTensorsConfig, {"format": "mixed-precision"}),
    (
        {"quant_method": "compressed-tensors", "quantization_config": MIXED},
        CompressedTensorsConfig,
        {"dequantize": False},
    ),
    ({**LLM_COMPRESSOR, "run_compressed": False}, CompressedTensorsConfig, {"dequantize": True}),
    (AUTO_ROUND, AutoRoundConfig, {"packing_format": "auto_round:auto_gptq", "backend": "auto_round:gptq:exllamav2"}),
    (HQQ, HqqConfig, {"nbits": 3, "axis": 0, "round_zero": False}),
    (TORCHAO, TorchaoConfig, {"type_name": "Int8WeightOnlyConfig"}),
    ({"quant_method": "quanto", "weights": "int4", "activations": None}, QuantoConfig, {"weights": "int4"}),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, Mxfp4Config, {}),
    (QUARK, QuarkConfig, {"exclude": ("lm_head",)}),
    ({"load_in_4bit": True, "modules_to_not_convert": ["a"]}, Bnb4bitConfig, {"llm_int8_skip_modules": ("a",)}),
]


@pytest.mark.parametrize(("given", "cls", "values"), REAL)
def test_real_dicts_are_read_and_survive_a_round_trip(given, cls, values):
    config = parse(given, CONFIG_CLASSES)
    assert type(config) is cls
    assert {name: getattr(config, name) for name in values} == values
    assert parse(config.to_dict(extras=True), CONFIG_CLASSES) == config
    hash(config)


@pytest.mark.parametrize(("given", "cls", "values"), REAL)
def test_nothing_of_a_real_dict_is_lost(given, cls, values):
    """Every key comes out again, under its name of today if it has another."""
    config = cls.from_dict(given)
    given = given.get("quantization_config", given)
    written = config.to_dict(extras=True)
    moved = {*cls.aliases, "run_compressed"}
    lost = {key: value for key, value in given.items() if key not in written and key not in moved}
    assert not {key: value for key, value in lost.items() if value not in (None, {}, False)}, lost


def test_a_dict_of_the_mixed_kind_in_types():
    config = CompressedTensorsConfig.from_dict(MIXED)
    attention, mlp = config.groups.values()
    assert attention.weights is not None
    assert attention.weights.block == (128, 128)
    assert config.group_of("model.layers.3.self_attn.q_proj") == attention  # a pattern wins over a class
    assert config.group_of("model.layers.0.mlp.up_proj") == mlp
    assert config.group_of("model.layers.1.mlp.down_proj") == mlp
    assert config.group_of("model.layers.1.norm", "RMSNorm") is None
    assert config.group_of("lm_head") is None
    assert config.group_of("model.layers.0.mlp.gate") is None
    assert config.group_of("model.layers.1.mlp.gate") == mlp


def test_ignore_in_the_words_of_selection():
    selection = CompressedTensorsConfig.from_dict({**MIXED, "ignore": ["lm_head", "re:.*block.*gate"]}).selection
    assert not selection.selects("lm_head")
    assert selection.selects("model.lm_head")  # an entry without re: is the whole name
    assert not selection.selects("model.block.gate")
    assert not selection.selects("model.block.gate_proj")  # as re.match has it
    assert selection.selects("model.gate")


def test_compression_config_of_older_files():
    found = detect({"compression_config": LLM_COMPRESSOR})
    assert found == LLM_COMPRESSOR
    assert parse(found, CONFIG_CLASSES) == parse(LLM_COMPRESSOR, CONFIG_CLASSES)


def test_hqq_as_its_constructor_takes_it():
    config = parse({"quant_method": "hqq", "nbits": 8, "axis": None, "modules_to_not_convert": ["a"]}, CONFIG_CLASSES)
    assert config == HqqConfig(nbits=8, axis=1, round_zero=False, skip_modules=("a",))


def test_hqq_of_single_modules():
    given = {"quant_method": "hqq", "quant_config": {"self_attn.q_proj": HQQ["quant_config"]}, "skip_modules": []}
    config = HqqConfig.from_dict(given)
    assert config.dynamic["self_attn.q_proj"].nbits == 3
    assert config.to_dict() == given


def test_a_torchao_object_is_read():
    quantization = pytest.importorskip("torchao.quantization")
    given = {"quant_method": "torchao", "quant_type": quantization.Int8WeightOnlyConfig()}
    assert parse(given, CONFIG_CLASSES) == parse("torchao-int8", CONFIG_CLASSES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**AUTOGPTQ, "checkpoint_format": "gptq_v2", "format": "gptq"}, r"checkpoint_format: 'gptq_v2' contradicts"),
        ({**AUTOAWQ, "w_bit": 8}, r"w_bit: 8 contradicts bits=4"),
        ({**AUTOAWQ, "version": "exllama"}, r"format: 'exllama' is not allowed\. Give one of 'gemm', 'gemv'"),
        ({**DEEPSEEK_V3, "scale_format": "ue8m0"}, r"scale_format: is unknown .*Did you mean 'scale_fmt'"),
        ({"quant_method": "sparseml", "config_groups": {}}, r"quant_method: 'sparseml' is not supported"),
        (
            {"quant_method": "torchao", "quant_type": "int4_weight_only"},
            r"quant_type: 'int4_weight_only' is not allowed",
        ),
        ({**HQQ, "quant_config": {"weight_quant_params": {"nbit": 3}}}, r"nbit: is unknown .*Did you mean 'nbits'"),
        ({**HQQ, "quant_config": 5}, r"quant_config: is unknown"),
        (
            {**LLM_COMPRESSOR, "config_groups": {"W4A16": ["Linear"]}},
            r"config_groups\.W4A16: is a preset's name, with a list of targets\. Write the group out",
        ),
    ],
)
def test_what_is_wrong_with_a_dict_is_told(given, message):
    with pytest.raises(InputError, match=message):
        parse(given, CONFIG_CLASSES)
