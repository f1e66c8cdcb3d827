"""The libraries that `methods.py` compares with distquant, and their ways to load, quantize and store on a CPU.

A peer loads a folder in bfloat16, quantizes every linear except the output head, and returns the model. If
`from_pretrained` of transformers 5.23 quantizes with a method on the CPU, that is the peer. Otherwise (fp8 and hqq) the
model is loaded unquantized, and the method's own function quantizes one linear after the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import fresh


@dataclass(frozen=True)
class Peer:
    """One library's way.

    Attributes:
        how: a description for the page.
        load: folder -> model.
    """

    how: str
    load: Callable[[str], Any]


def plain(path: str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cpu", **options)


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields the modules to quantize: all linears except the head."""
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            yield name, module


def bnb(**fields: Any) -> Callable[[str], Any]:
    def load(path: str) -> Any:
        import torch
        from transformers import BitsAndBytesConfig

        options = {"bnb_4bit_compute_dtype": torch.bfloat16} if "load_in_4bit" in fields else {}
        return plain(path, quantization_config=BitsAndBytesConfig(**fields, **options))

    return load


def torchao(name: str) -> Callable[[str], Any]:
    def load(path: str) -> Any:
        import torchao.quantization
        from transformers import TorchAoConfig

        kind = getattr(torchao.quantization, name)()
        return plain(path, quantization_config=TorchAoConfig(quant_type=kind))

    return load


def quanto(weights: str) -> Callable[[str], Any]:
    def load(path: str) -> Any:
        from transformers import QuantoConfig

        return plain(path, quantization_config=QuantoConfig(weights=weights))

    return load


def hqq(path: str) -> Any:
    import torch
    from hqq.core.quantize import HQQLinear, hqq_base_quant_config

    model = plain(path)
    for name, module in linears(model):
        config = hqq_base_quant_config(nbits=4, group_size=64, axis=1)
        model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.bfloat16, device="cpu"))
    return model


def fp8(**fields: Any) -> Callable[[str], Any]:
    """Quantizes with `Fp8Quantize`, which skips weights of partial tiles, so that these are padded with zeros."""

    def load(path: str) -> Any:
        import torch
        from transformers import FineGrainedFP8Config
        from transformers.integrations.finegrained_fp8 import Fp8Quantize

        class Quantizer:
            quantization_config = FineGrainedFP8Config(**fields)

        model, operation = plain(path), Fp8Quantize(Quantizer())
        for _, module in linears(model):
            weight = module.weight.detach()
            out, into = weight.shape
            block = fields["weight_block_size"] or weight.shape
            if out % block[0] or into % block[1]:
                weight = torch.nn.functional.pad(weight, (0, -into % block[1], 0, -out % block[0]))
            converted = operation.convert({"m.weight": weight})
            codes = converted["m.weight"][:out, :into].contiguous()
            module.weight = torch.nn.Parameter(codes, requires_grad=False)
            module.register_buffer("weight_scale_inv", converted["m.weight_scale_inv"])
        return model

    return load


def compressed(preset: str) -> Callable[[str], Any]:
    """Computes scales by the library's `calculate_qparams` of each group's range; `ModelCompressor` packs."""
    return lambda path: _compressed(path, preset)[0]


def _compressed(path: str, preset: str) -> tuple[Any, Any]:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = plain(path)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for _, module in linears(model):
        if not hasattr(module, "quantization_scheme"):
            continue
        args, weight = module.quantization_scheme.weights, module.weight.data
        groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return model, compressor


def stored_quanto(path: str) -> Any:
    from optimum.quanto import QuantizedModelForCausalLM

    # The wrapper is not a module, but it holds one.
    return QuantizedModelForCausalLM.from_pretrained(path)._wrapped


PEERS = {
    "nf4": Peer("from_pretrained, BitsAndBytesConfig", bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "nf4-dq": Peer(
        "from_pretrained, BitsAndBytesConfig",
        bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "int8": Peer("from_pretrained, BitsAndBytesConfig", bnb(load_in_8bit=True)),
    "int4": Peer("from_pretrained, then compressed-tensors' ModelCompressor", compressed("W4A16")),
    "fp8-row": Peer("from_pretrained, then compressed-tensors' ModelCompressor", compressed("FP8_DYNAMIC")),
    "fp8": Peer("from_pretrained, then transformers' Fp8Quantize", fp8(weight_block_size=(128, 128))),
    "fp8-tensor": Peer("from_pretrained, then transformers' Fp8Quantize", fp8(weight_block_size=None)),
    "mxfp8": Peer("from_pretrained, then transformers' Fp8Quantize", fp8(weight_block_size=(1, 32), scale_fmt="ue8m0")),
    "quanto-int8": Peer("from_pretrained, QuantoConfig", quanto("int8")),
    "quanto-int4": Peer("from_pretrained, QuantoConfig", quanto("int4")),
    "torchao-int8": Peer("from_pretrained, TorchAoConfig", torchao("Int8WeightOnlyConfig")),
    "torchao-fp8": Peer("from_pretrained, TorchAoConfig", torchao("Float8WeightOnlyConfig")),
    "hqq": Peer("from_pretrained, then HQQLinear", hqq),
    "stored": Peer("from_pretrained", plain),
    "stored quanto": Peer("QuantizedModelForCausalLM.from_pretrained", stored_quanto),
}
"""Peers by distquant's short name; the last two only load stored quantized weights."""

STORED = ("nf4", "nf4-dq", "int8", "int4", "torchao-int8", "torchao-fp8", "quanto-int8")
"""Methods whose checkpoints a library both writes and loads on the CPU."""

WITHOUT = {
    "fp4, fp4-dq": "the same code as nf4 and nf4-dq, on both sides",
    "gptq-rtn, awq-rtn, and checkpoints of gptq, awq and auto-round": (
        "their libraries (gptqmodel, autoawq, auto-round) are not installed here; transformers has no code of its own"
    ),
    "fbgemm_fp8": "`torch.ops.fbgemm.quantize_fp8_per_row` is not in fbgemm-gpu-cpu, and transformers wants a GPU",
    "torchao-int4": "`Int4WeightOnlyConfig` packs for GPU kernels; neither side runs it on a CPU",
    "checkpoints of fp8, mxfp8, fbgemm_fp8 and hqq": (
        "transformers loads them on GPUs, or (fp8 on a CPU) as dequantized bfloat16, or (hqq) not at all in 5.23"
    ),
    "gguf files": "no library here writes one from a safetensors checkpoint; transformers loads them dequantized",
    "mxfp4": "transformers quantizes nothing but experts with it, by kernels that the package `kernels` would download",
    "nvfp4": "loaded by transformers on both sides",
}
"""Methods without a row in the table of speeds -> the reason."""


def store(path: str, method: str, work: str) -> str:
    """Returns the folder below `work` of a checkpoint that the method's library saved; makes it if needed."""
    folder = Path(work) / f"{Path(path).name}-{method}"
    if not folder.is_dir():
        print(f"making {folder}", flush=True)
        fresh(_store, path, method, str(folder))
    return str(folder)


def _store(path: str, method: str, folder: str) -> bool:
    unfinished = f"{folder}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if method == "quanto-int8":
        from optimum.quanto import QuantizedModelForCausalLM, qint8

        QuantizedModelForCausalLM.quantize(plain(path), weights=qint8, exclude="lm_head").save_pretrained(unfinished)
    elif method == "int4":
        model, compressor = _compressed(path, "W4A16")
        model.save_pretrained(unfinished)
        compressor.update_config(unfinished)
    else:
        PEERS[method].load(path).save_pretrained(unfinished)
    os.rename(unfinished, folder)
    return True
