"""Checkpoints as tools in the field write them: small random weights, stored by the formats' definitions alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from packed_words import Kind, dense_weight, make_weight, pack_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors by suffix after the module's name, and the weight that they mean."""

Writer = Callable[[Tensor], Stored]


def packed(**kind: Any) -> Writer:
    """GPTQ, AWQ or AutoRound: the weight is another one, random as well."""

    def write(weight: Tensor) -> Stored:
        one = Kind(**kind)
        stored = make_weight((weight.shape[0], weight.shape[1]), one, int(weight.numel()), torch.float16)
        return stored, dense_weight(stored, one).float()

    return write


def fp8_tiles(weight: Tensor) -> Stored:
    """`quant_method: fp8` in tiles of 128 x 128."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            scale[i, j] = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].abs().max() / 448
    full = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    codes = (weight / full).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * full


def autofp8(shape: tuple[int, ...], scale_name: str = "weight_scale", static: bool = True) -> Writer:
    """AutoFP8: one scale of the given shape for the weight, and one for its inputs."""

    def write(weight: Tensor) -> Stored:
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        stored = {"weight": codes, scale_name: scale.view(shape)}
        return stored | ({"input_scale": torch.full(shape, 0.02)} if static else {}), codes.float() * scale

    return write


def float8_rows(weight: Tensor) -> Stored:
    """FBGEMM, and compressed-tensors' strategy "channel"."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def int4_groups(weight: Tensor) -> Stored:
    """compressed-tensors' pack-quantized: symmetric, groups of 32."""
    groups = weight.view(len(weight), -1, 32)
    scale = (groups.abs().amax(2) / 7).to(torch.bfloat16)
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    words = pack_bits((codes.view(weight.shape) + 8).numpy().T.astype("int64"), 4).T.copy().view("int32")
    beside = {"weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return {"weight_packed": torch.from_numpy(words), **beside}, (codes * scale.float()[..., None]).view(weight.shape)


def nf4(weight: Tensor) -> Stored:
    """bitsandbytes' own."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.to(torch.bfloat16), quant_type="nf4", compress_statistics=False)
    beside = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {"weight": codes, **beside}, functional.dequantize_4bit(codes, state).float()


def int8_rows(codes: str, scale_name: str, divisor: float, **beside: Tensor) -> Writer:
    """Rows of int8 under one scale, by these suffixes."""

    def write(weight: Tensor) -> Stored:
        scale = weight.abs().amax(1, keepdim=True) / 127
        values = (weight / scale).round().to(torch.int8)
        stored = scale if scale_name != "SCB" else scale.view(-1) * divisor
        zeros = {"_weight_zero_point": torch.zeros_like(values[:, :1])} if codes.startswith("_weight") else {}
        return {codes: values, scale_name: stored, **zeros, **beside}, values.float() * scale

    return write


def write_checkpoint(
    dense: Path,
    folder: Path,
    writer: Writer | Callable[[str], Writer],
    quantized: Callable[[str], bool],
    config: Mapping[str, Any],
    name_in_file: Callable[[str], str] = str,
    more: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Writes a checkpoint, and returns what the weights of its linear modules mean, in the model's names.

    Args:
        dense: the unquantized checkpoint.
        folder: the new one.
        writer: stores a weight; or gives the writer of a module.
        quantized: True for the modules that are stored quantized.
        config: its `quantization_config`.
        name_in_file: a module's name in the file, from the model's.
        more: further tensors of the file.
    """
    document = json.loads((dense / "config.json").read_text())
    stored, means = dict(more or {}), {}
    for name, value in load_file(dense / "model.safetensors").items():
        module = name.rpartition(".")[0]
        if name.endswith("proj.weight") and quantized(module):
            write = writer(module) if getattr(writer, "by_module", False) else writer
            tensors, means[name] = write(value.float())
            stored |= {f"{name_in_file(module)}.{suffix}": tensor for suffix, tensor in tensors.items()}
        else:
            means |= {name: value.float()} if name.endswith("proj.weight") else {}
            stored[f"{name_in_file(module)}.{name.rpartition('.')[2]}"] = value
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**document, "quantization_config": dict(config)}))
    return means


def by_module(choose: Callable[[str], Writer]) -> Callable[[str], Writer]:
    """Marks a function that gives the writer of a module."""
    choose.by_module = True  # type: ignore[attr-defined]
    return choose
