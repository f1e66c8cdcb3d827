"""Checkpoints of GPTQ and AWQ, packed and unpacked bit by bit from the formats' definitions, with nothing of distquant.

Layouts: AutoGPTQ and GPTQModel, `nn_modules/qlinear/__init__.py` (`pack_original`) and `utils/model.py`
(`convert_gptq_v2_to_v1_format_module`); AutoAWQ, `modules/linear/gemm.py`; auto-round's packings are the same.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column in each nibble of an AWQ word."""


@dataclass(frozen=True)
class Kind:
    """How a checkpoint is stored; `own` are modules (by suffix) with fields of their own."""

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    v1: bool = True
    act_order: bool = False
    index: bool = True
    packing: str = ""
    own: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def awq(self) -> bool:
        return self.method == "awq" or "awq" in self.packing

    def of(self, module: str) -> Kind:
        """The same with a module's own fields."""
        names = {"bits": "bits", "group_size": "group", "desc_act": "act_order"}
        for suffix, fields in self.own.items():
            if module.endswith(suffix):
                return replace(self, **{names[key]: value for key, value in fields.items()})
        return self

    def config(self, modules: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        written: dict[str, Any] = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "gptq":
            written |= {"sym": False, "desc_act": self.act_order}
            written["checkpoint_format"] = "gptq" if self.v1 else "gptq_v2"
            if self.own:
                written["dynamic"] = {rf"+:.*\.{suffix}$": fields for suffix, fields in self.own.items()}
        elif self.method == "awq":
            written |= {"zero_point": True, "version": "gemm"}
        else:
            written |= {"sym": False, "packing_format": self.packing, "data_type": "int"}
            own = {m: f for s, f in self.own.items() for m in modules if m.endswith(s)}
            if own:
                written["extra_config"] = own
        return written


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """uint32 `[n * bits / 32, m]` from `[n, m]`: one stream of bits down each column."""
    words = np.zeros((len(values) * bits // 32, values.shape[1]), np.uint32)
    for row in range(len(values)):
        for bit in range(bits):
            at = row * bits + bit
            words[at // 32] |= ((values[row].astype(np.uint32) >> np.uint32(bit)) & np.uint32(1)) << np.uint32(at % 32)
    return words


def unpack_bits(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack_bits`."""
    values = np.zeros((len(words) * 32 // bits, words.shape[1]), np.int64)
    for row in range(len(values)):
        for bit in range(bits):
            at = row * bits + bit
            values[row] |= ((words[at // 32].astype(np.int64) >> (at % 32)) & 1) << bit
    return values


def pack_awq(values: np.ndarray) -> np.ndarray:
    """uint32 `[n, m / 8]` from `[n, m]`."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for slot, place in enumerate(ORDER):
            words[:, column] |= values[:, 8 * column + place].astype(np.uint32) << np.uint32(4 * slot)
    return words


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """The inverse of `pack_awq`."""
    values = np.zeros((len(words), words.shape[1] * 8), np.int64)
    for column in range(words.shape[1]):
        for slot, place in enumerate(ORDER):
            values[:, 8 * column + place] = words[:, column].astype(np.int64) >> (4 * slot) & 15
    return values


def _less_one(zeros: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ v1's words along the outputs: one is subtracted from every field, in whole words but for 3 bits."""
    if bits == 3:
        return pack_bits((zeros.T - 1) % 8, 3).T
    return pack_bits(zeros.T, bits).T - pack_bits(np.ones_like(zeros.T), bits).T


def _plus_one(words: np.ndarray, bits: int) -> np.ndarray:
    """Zero points from GPTQ v1's words."""
    if bits == 3:
        return (unpack_bits(words.T, 3).T + 1) % 8
    ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
    return unpack_bits((words + ones).T, bits).T


def _tensor(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(words).astype(np.uint32).view(np.int32))


def make_weight(shape: tuple[int, int], kind: Kind, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The stored tensors of a random weight `[out, in]`; every code and zero point occurs, 0 among them."""
    rng = np.random.default_rng(seed)
    (rows, columns), top = shape, 2**kind.bits
    group = columns if kind.group == -1 else kind.group
    groups = -(-columns // group)
    codes, zeros = rng.integers(0, top, (columns, rows)), rng.integers(0, top, (groups, rows))
    scales = torch.from_numpy(rng.uniform(0.5, 2, (groups, rows)) * 4 / top / columns**0.5).to(dtype)
    if kind.awq:
        return {"qweight": _tensor(pack_awq(codes)), "qzeros": _tensor(pack_awq(zeros)), "scales": scales}
    stored = _less_one(zeros, kind.bits) if kind.v1 else pack_bits(zeros.T, kind.bits).T
    found = {"qweight": _tensor(pack_bits(codes, kind.bits)), "qzeros": _tensor(stored), "scales": scales}
    if kind.index:
        order = rng.permutation(columns) if kind.act_order else np.arange(columns)
        found["g_idx"] = torch.from_numpy((order // group).astype(np.int32))
    return found


def dense_weight(stored: dict[str, torch.Tensor], kind: Kind) -> torch.Tensor:
    """`[out, in]` in the dtype of the scales, from stored tensors."""
    words = {name: stored[name].numpy().view(np.uint32) for name in ("qweight", "qzeros")}
    if kind.awq:
        codes, zeros = unpack_awq(words["qweight"]), unpack_awq(words["qzeros"])
    else:
        codes = unpack_bits(words["qweight"], kind.bits)
        zeros = _plus_one(words["qzeros"], kind.bits) if kind.v1 else unpack_bits(words["qzeros"].T, kind.bits).T
    group = len(codes) if kind.group == -1 else kind.group
    numbers = stored["g_idx"].numpy() if "g_idx" in stored else np.arange(len(codes)) // group
    rows = []
    for column, number in enumerate(numbers):
        steps = torch.from_numpy(codes[column] - zeros[number]).to(torch.float32)
        rows.append((steps * stored["scales"][number].float()).to(stored["scales"].dtype))
    return torch.stack(rows, 1)


def rewrite_packed(folder: Path, kind: Kind, scales: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """Stores all linears of a checkpoint's blocks in a kind, with random values; returns their dense weights."""
    tensors, dense = {}, {}
    modules = []
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.dim() != 2 or ".layers." not in name:
            tensors[name] = tensor
            continue
        own = kind.of(module)
        modules.append(module)
        made = make_weight((tensor.shape[0], tensor.shape[1]), own, zlib.crc32(module.encode()), scales)
        tensors |= {f"{module}.{component}": value.contiguous() for component, value in made.items()}
        dense[name] = dense_weight(made, own)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = kind.config(modules)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return dense


def store_dense(folder: Path, dense: dict[str, torch.Tensor]) -> Path:
    """An unquantized checkpoint with these weights, all in float32."""
    tensors = {**load_file(folder / "model.safetensors"), **dense}
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
