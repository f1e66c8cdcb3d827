"""Invalid values are reported all at once, with valid ones."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distquant.config import CONFIG_CLASSES, parse
from distquant.errors import InputError

GROUP: dict[str, Any] = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}


def group(**values: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"g": {**GROUP, "weights": values}}}


WRONG = [
    ({"quant_method": "gptq", "bits": 5}, [r"bits: 5 is not allowed\. Give one of 2, 3, 4, 8"]),
    ({"quant_method": "gptq"}, ["bits: is missing"]),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 0, "damp_percent": 1.0, "dataset": "c5", "batch_size": 0},
        ["group_size: 0 is not positive.*-1", "damp_percent: 1.0 is not between", "dataset: 'c5'", "batch_size: 0"],
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": -2}, ["group_size: -2 is not positive"]),
    ({"quant_method": "gptq", "bits": True}, ["bits: True is not allowed"]),
    ({"quant_method": "awq", "bits": 6, "group_size": 0}, ["bits: 6", "group_size: 0"]),
    ({"quant_method": "awq", "backend": "fast"}, ["backend: 'fast' is not allowed"]),
    ({"quant_method": "auto-round", "bits": 9, "group_size": 0}, ["bits: 9", "group_size: 0"]),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, [r"weight_block_size: invalid tile \[0, 128\]"]),
    ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size: .* is not allowed"]),
    ({"quant_method": "fp8", "fmt": "e5m2", "scale_fmt": "half"}, ["fmt: 'e5m2'", "scale_fmt: 'half'"]),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 0}, ["activation_scale_ub: invalid magnitude 0.0"]),
    ({"quant_method": "hqq", "nbits": 5, "axis": 2, "group_size": 0}, ["nbits: 5", "axis: 2", "group_size: 0"]),
    (
        {"quant_method": "hqq", "dynamic_config": {"a": {"nbits": 7, "axes": 1}}},
        [r"dynamic_config\.a\.axes: is unknown"],
    ),
    ({"quant_method": "hqq", "dynamic_config": {"a": {"nbits": 7}}}, [r"dynamic_config\.a\.nbits: 7"]),
    ({"quant_method": "hqq", "dynamic_config": {"a": 5}}, ["dynamic_config: .* is not allowed"]),
    ({"quant_method": "quanto", "weights": "int3"}, ["weights: 'int3' is not allowed"]),
    ({"quant_method": "torchao"}, ["quant_type: is missing"]),
    ({"quant_method": "torchao", "quant_type": {"a": {}, "b": {}}}, ["quant_type: has the keys 'a', 'b'"]),
    ({"quant_method": "torchao", "quant_type": {"default": {"_data": {}}}}, ["default: .* is not a serialized"]),
    ({"quant_method": "torchao", "quant_type": {"default": {"_type": "A", "_data": 5}}}, ["_data: 5 is not an object"]),
    (group(num_bits=0), [r"config_groups\.g\.weights\.num_bits: 0 is out of range"]),
    (group(num_bits=5, type="float"), ["invalid float of 5 bits"]),
    (group(strategy="group"), ["group_size: invalid group size None"]),
    (group(strategy="channel", group_size=128), ["group_size: 128 contradicts the strategy 'channel'"]),
    (group(strategy="block"), ["block_structure: None contradicts"]),
    (group(block_structure=[128, 128]), ["block_structure: .* contradicts the strategy 'tensor'"]),
    (group(strategy="block", block_structure="128"), ["block_structure: invalid tile '128'"]),
    (group(strategy="block", block_structure=[0, 1]), ["invalid tile"]),
    (group(strategy="blocks", num_bit=4), ["strategy: 'blocks' is not allowed", "num_bit: is unknown.*'num_bits'"]),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {}}}}, [r"g\.targets: is missing"]),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": 5}}, [r"config_groups\.g: 5 is not allowed"]),
    ({"quant_method": "compressed-tensors", "ignore": ["re:["]}, [r"ignore: 're:\[' is not a regular expression"]),
    ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"bits": 8}}, [r"kv_cache_scheme\.bits: is unknown"]),
    ({"quant_method": "compressed-tensors", "layers": "3-1"}, ["layers: '3-1'"]),
    ({"quant_method": "aqlm", "num_codebooks": 0, "in_group_size": -1}, ["num_codebooks: 0", "in_group_size: -1"]),
    ({"quant_method": "vptq", "enable_proxy_error": True}, ["enable_proxy_error: True is for training"]),
    ({"quant_method": "vptq", "config_for_layers": {"a": {"is_indice_packed": False}}}, ["is_indice_packed: False"]),
    ({"quant_method": "spqr", "bits": 4, "beta1": 8, "beta2": 8}, ["bits: 4", "beta1: 8", "beta2: 8"]),
    ({"quant_method": "higgs", "bits": 5, "p": 3, "group_size": 32}, ["bits: 5", "p: 3", "group_size: 32"]),
    ({"quant_method": "higgs", "hadamard_size": 100}, ["hadamard_size: 100 is not a multiple of group_size=256"]),
    (
        {"quant_method": "fp_quant", "forward_method": "quest", "backward_dtype": "mxfp8", "hadamard_group_size": 8},
        ["forward_method: 'quest' does not go", "backward_dtype: 'mxfp8' does not", "hadamard_group_size: 8"],
    ),
    ({"quant_method": "fp_quant", "forward_dtype": "mxfp4", "hadamard_group_size": 16}, ["hadamard_group_size: 16"]),
    ({"quant_method": "metal", "bits": 3, "group_size": 0}, ["bits: 3", "group_size: 0"]),
    (
        {"quant_method": "gemma", "num_bits": 3, "module_quant_configs": {"a": {"num_bits": 5}}},
        ["num_bits: 3", "a.*: 5"],
    ),
    (
        {"quant_method": "sinq", "nbits": 0, "group_size": 0, "method": "b"},
        ["method: 'b'", "nbits: 0", "group_size: 0"],
    ),
    ({"quant_method": "bitnet", "linear_class": "a", "quantization_mode": "b"}, ["linear_class", "quantization_mode"]),
    ({"quant_method": "eetq", "weights": "int4"}, ["weights: 'int4'"]),
    ({"quant_method": "quark", "excludes": []}, ["excludes: is unknown.*'exclude'"]),
    ({"quant_method": "mxfp4", "modules_to_not_convertt": []}, ["Did you mean 'modules_to_not_convert'"]),
    ({"quant_method": "gguf", "file": "a"}, ["file: is unknown"]),
]


@pytest.mark.parametrize(("given", "messages"), WRONG)
def test_wrong_values_are_reported_together(given, messages):
    with pytest.raises(InputError) as caught:
        parse(given, CONFIG_CLASSES)
    reported = [str(problem) for problem in caught.value.problems]
    assert len(reported) == len(messages), reported
    for message in messages:
        assert any(re.search(message, text) for text in reported), (message, reported)


@pytest.mark.parametrize("cls", [cls for cls in CONFIG_CLASSES if cls.__name__ != "NoneConfig"])
def test_unknown_keys_are_reported_by_every_method(cls):
    with pytest.raises(InputError, match=r"quux: is unknown \(given 1\)"):
        cls.from_dict({"quux": 1})


@pytest.mark.parametrize("size", [-1, 1, 32, 128])
@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round"])
def test_groups_that_work(method, size):
    for bits in (2, 3, 4, 8):
        config = parse({"quant_method": method, "bits": bits, "group_size": size}, CONFIG_CLASSES)
        assert config is not None
        assert config.vocabulary()[0].group == ("row" if size == -1 else size)
