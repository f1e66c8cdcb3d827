"""Quantization configs in files beside a config.json that names none: read where they are complete, with a note."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from field import Writer, autofp8, packed, write_checkpoint

import distquant as dq

AUTOGPTQ = {
    "bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False, "true_sequential": True,
    "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip
GPTQMODEL = {**AUTOGPTQ, "quant_method": "gptq", "checkpoint_format": "gptq", "static_groups": False}
AUTOAWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
RENAMED_AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}
MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}


def written(model: Path, folder: Path, writer: Writer, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a checkpoint whose config is in a file of its own; returns what its weights mean."""
    means = write_checkpoint(model, folder, writer, lambda module: "lm_head" not in module, {})
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (folder / "config.json").write_text(json.dumps(document))
    (folder / name).write_text(json.dumps(config))
    return means


@pytest.mark.parametrize(
    ("name", "config", "writer"),
    [
        # vllm-project/vllm#13612, #10848; qwopqwop200/GPTQ-for-LLaMa; TheBloke's early files
        ("quantize_config.json", AUTOGPTQ, packed()),
        ("quantize_config.json", GPTQMODEL, packed()),
        ("quantize_config.json", {"bits": 4, "groupsize": 32, "sym": False}, packed()),
        # huggingface/text-generation-inference#1019; casper-hansen/AutoAWQ#229
        ("quant_config.json", AUTOAWQ, packed(method="awq")),
        ("quantize_config.json", RENAMED_AWQ, packed(method="awq")),
        # NVIDIA/Model-Optimizer, examples/llm_ptq
        ("hf_quant_config.json", MODELOPT, autofp8(())),
    ],
)  # fmt: skip
def test_read_with_a_note(model_of: Callable[[str], str], tmp_path: Path, name, config, writer) -> None:
    folder = tmp_path / "quantized"
    means = written(Path(model_of("llama-gqa")), folder, writer, name, config)
    model = dq.load(folder)
    assert any(note.startswith(f"quantization from {name}: ") for note in model.distquant.plan.notes)
    for parameter, meant in means.items():
        module = model.get_submodule(parameter.removesuffix(".weight"))
        found = module.dequantize() if hasattr(module, "dequantize") else module.weight
        torch.testing.assert_close(found.float(), meant, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [
        ("quantize_config.json", {"sym": True}, r"quantize_config\.json: does not say how .* Put a complete q"),
        ("hf_quant_config.json", {"producer": {}}, r"hf_quant_config\.json: does not say how"),
        ("quantize_config.json", [1], r"quantize_config\.json: is \[1\], not a JSON object"),
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "W4A8_AWQ"}},
            r"'modelopt W4A8_AWQ' is not supported",
        ),
    ],
)  # fmt: skip
def test_what_says_too_little(model_of: Callable[[str], str], tmp_path: Path, name, config, says) -> None:
    folder = tmp_path / "quantized"
    writer = autofp8(()) if name.startswith("hf") else packed()
    written(Path(model_of("llama-gqa")), folder, writer, name, config)
    with pytest.raises(dq.InputError, match=says):
        dq.plan(folder)


def test_what_lies_beside_unquantized_tensors_is_of_another_checkpoint(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama-gqa")
    (folder / "quantize_config.json").write_text(json.dumps(AUTOGPTQ))
    assert dq.plan(folder).quantization_config == {"quant_method": "none"}


def test_the_config_comes_first(model_of: Callable[[str], str], tmp_path: Path) -> None:
    folder = tmp_path / "quantized"
    own = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
    write_checkpoint(Path(model_of("llama-gqa")), folder, packed(), lambda module: "lm_head" not in module, own)
    (folder / "quantize_config.json").write_text(json.dumps({**AUTOGPTQ, "bits": 8}))
    plan = dq.plan(folder)
    assert plan.quantization_config["bits"] == 4
    assert not any("quantize_config.json" in note for note in plan.notes)
