"""Mixtures of experts as quantized checkpoints store them, written from the formats' definitions.

One tensor per expert and component, under the hub's names: FP8 as DeepSeek-V3 has it, GPTQ, AWQ, and int4 of
compressed-tensors. MXFP4 as gpt-oss has it, with all experts in one tensor. Beside each goes its dense twin: the
same checkpoint in float32, unquantized, with the values that the codes mean.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_models import read_all
from packed_words import Kind, dense_weight, make_weight
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
How = Callable[[str, Tensor], tuple[Tensors, Tensor]]
"""Weight's name and values -> stored tensors by suffix, and the dense weight that they mean."""

LINEARS = re.compile(r"\.layers\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
"""What tools quantize of a mixture of experts: all projections; no router, and no gate of a shared expert."""


def write_stored(source: Path, target: Path, twin: Path, quantization: dict[str, Any], how: How) -> None:
    """Rewrites a checkpoint in hub form: `target` quantized, `twin` in float32 with the same values."""
    stored, dense = {}, {}
    for name, value in read_all(source).items():
        if LINEARS.search(name):
            parts, dense[name] = how(name, value)
            stored |= {f"{name.removesuffix('weight')}{suffix}": part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = dense[name] = value
    _write(source, target, stored, quantization)
    _write(source, twin, {name: value.float() for name, value in dense.items()}, None)


def _write(source: Path, folder: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> None:
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({n: v.contiguous() for n, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


# -- FP8 ---------------------------------------------------------------------------------------------------------------

TILE = 128
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [TILE, TILE]}
"""`quantization_config` of DeepSeek-V3."""


def fp8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """Tiles of 128 x 128, the last of a dim ragged: codes float8 e4m3, a float32 scale a tile."""
    rows, columns = weight.shape
    spread = torch.zeros(-(-rows // TILE), -(-columns // TILE))
    for i in range(spread.shape[0]):
        for j in range(spread.shape[1]):
            tile = weight[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
            spread[i, j] = tile.float().abs().amax() / 448
    scale = spread.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": spread}, codes.float() * scale


# -- integers in words -------------------------------------------------------------------------------------------------


def words(kind: Kind) -> How:
    """GPTQ or AWQ, with random codes, zero points and scales."""

    def how(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        made = make_weight(shape, kind, zlib.crc32(name.encode()), torch.float16)
        return made, dense_weight(made, kind)

    return how


GROUP = 32
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*shared_expert_gate", "re:.*mlp.gate", "re:.*block_sparse_moe.gate"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
}
"""As llm-compressor writes it for a mixture of experts."""


def compressed(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """int4 in groups of 32 inputs, eight values + 8 in an int32, the first in the lowest bits."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    codes = torch.randint(-8, 8, (rows, columns), generator=generator)
    scale = (torch.rand(rows, columns // GROUP, generator=generator) + 0.5) / 4 / columns**0.5
    scale = scale.to(torch.bfloat16)
    packed = ((codes + 8).view(rows, -1, 8) << (4 * torch.arange(8))).sum(-1)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor([rows, columns])}
    return parts, codes.float() * scale.float().repeat_interleave(GROUP, 1)


# -- MXFP4 -------------------------------------------------------------------------------------------------------------

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of FP4 codes 0 to 7; bit 3 is the sign (OCP Microscaling 1.0, table 5)."""
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""`quantization_config` of gpt-oss."""


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[expert, out, in]`: blocks u8 `[expert, out, in / 32, 16]`, low nibble first; scales u8; the dense weight.

    A scale is the power of two (+ 127) that brings the block's largest magnitude to at most 6; values go to the nearest
    code, the lower of two.
    """
    values = weight.float().unflatten(-1, (-1, 32))
    power = torch.ceil(torch.log2(values.abs().amax(-1, keepdim=True) / 6))
    magnitude = torch.tensor(E2M1)
    codes = ((values / torch.exp2(power)).abs().unsqueeze(-1) - magnitude).abs().argmin(-1)
    dense = magnitude[codes] * values.sign() * torch.exp2(power)
    codes = codes + 8 * (values < 0)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (power.squeeze(-1) + 127).to(torch.uint8), dense.flatten(-2)


def write_mxfp4(source: Path, target: Path, twin: Path, transposed: bool = True) -> None:
    """A checkpoint of fused experts (as gpt-oss's, `[expert, in, out]`, if turned) in MXFP4, and its dense twin."""
    stored, dense = {}, {}
    for name, value in read_all(source).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, meant = mxfp4(value.transpose(1, 2) if transposed else value)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            dense[name] = meant.transpose(1, 2) if transposed else meant
        else:
            stored[name] = dense[name] = value
    _write(source, target, stored, MXFP4)
    _write(source, twin, {name: value.float() for name, value in dense.items()}, None)


# -- all of them -------------------------------------------------------------------------------------------------------

GPTQ, AWQ = Kind(group=GROUP), Kind(method="awq", group=GROUP)
ACT_ORDER = Kind(group=GROUP, act_order=True)

KINDS: dict[str, tuple[str, Callable[[Path, Path, Path], None]]] = {
    "fp8": ("deepseek-v3", lambda *paths: write_stored(*paths, FP8, fp8)),
    "gptq": ("mixtral", lambda *paths: write_stored(*paths, GPTQ.config([]), words(GPTQ))),
    "gptq act order": ("mixtral", lambda *paths: write_stored(*paths, ACT_ORDER.config([]), words(ACT_ORDER))),
    "awq": ("olmoe", lambda *paths: write_stored(*paths, AWQ.config([]), words(AWQ))),
    "compressed-tensors": ("qwen2-moe", lambda *paths: write_stored(*paths, COMPRESSED, compressed)),
    "mxfp4": ("gpt-oss", write_mxfp4),
}
"""Kind -> family, and what writes (source, target, twin)."""


def save_stored(kind: str, source: Path, folder: Path) -> tuple[Path, Path]:
    """Paths of a quantized checkpoint and of its dense twin, made from a family's checkpoint in hub form."""
    target, twin = folder / "stored", folder / "twin"
    shutil.rmtree(folder, ignore_errors=True)
    KINDS[kind][1](source, target, twin)
    return target, twin
