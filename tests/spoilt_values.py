"""Quantized checkpoints with one stored value spoilt: what a load must refuse, and what it must let pass.

A case names a checkpoint, a component of one weight, and what becomes of it. Components have roles (scales, exponents,
tables, ...), and each role has its values: so a method that is added gets all cases of its components' roles.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).resolve().parent / "data"
Spoil = Callable[[Tensor], Tensor | None]
"""Gets a stored component, returns what is stored in its place; None = nothing."""


@dataclass(frozen=True)
class Case:
    """One spoilt value.

    Attributes:
        base: the checkpoint; see `BASES`.
        suffix: of the component's name in it.
        name: what is wrong.
        spoil: makes the wrong value.
        legal: True if it is nothing wrong.
    """

    base: str
    suffix: str
    name: str
    spoil: Spoil
    legal: bool = False

    def __str__(self) -> str:
        return f"{self.base}: {self.suffix}: {self.name}"


# -- what may happen to a tensor ---------------------------------------------------------------------------------------


def put(value: float, stored: Tensor) -> Tensor:
    """One element has another value."""
    changed = stored.clone()
    changed.view(-1)[changed.numel() // 2] = value
    return changed


def byte(value: int, stored: Tensor) -> Tensor:
    """One element has another bit pattern, of a dtype of one byte."""
    return put(value, stored.view(torch.uint8)).view(stored.dtype)


def cast(dtype: torch.dtype, stored: Tensor) -> Tensor:
    return stored.to(torch.float32).to(dtype)


def flat_longer(stored: Tensor) -> Tensor:
    """One element more, or one row."""
    if stored.dim() == 0:
        return stored.repeat(2)
    return torch.cat((stored, stored[:1]))


def shorter(stored: Tensor) -> Tensor:
    return stored[:-1].clone() if stored.dim() else stored.new_empty(0)


def gone(stored: Tensor) -> None:
    return None


def reversed_(stored: Tensor) -> Tensor:
    return stored.flip(0)


FORM: dict[str, Spoil] = {"longer": flat_longer, "shorter": shorter, "gone": gone}
NOT_FLOAT: dict[str, Spoil] = {"as int32": partial(cast, torch.int32), "as float64": partial(cast, torch.float64)}
NOT_INTEGER: dict[str, Spoil] = {"as float32": partial(cast, torch.float32), "as int16": partial(cast, torch.int16)}
NOT_FINITE: dict[str, Spoil] = {
    "nan": partial(put, math.nan),
    "inf": partial(put, math.inf),
    "-inf": partial(put, -math.inf),
}
LITTLE: dict[str, Spoil] = {"0": partial(put, 0.0), "1e-3": partial(put, 1e-3)}

ROLES: dict[str, tuple[dict[str, Spoil], dict[str, Spoil]]] = {
    "scale": ({**NOT_FINITE, **NOT_FLOAT, **FORM}, {**LITTLE, "-1": partial(put, -1.0)}),
    "shared": ({**NOT_FINITE, **NOT_FLOAT}, {**LITTLE, "-1": partial(put, -1.0)}),
    "magnitude": ({**NOT_FINITE, **NOT_FLOAT, **FORM, "-1": partial(put, -1.0)}, LITTLE),
    "divisor": (
        {**NOT_FINITE, **NOT_FLOAT, "-1": partial(put, -1.0), "0": partial(put, 0.0)},
        {"2": partial(put, 2.0)},
    ),
    "exponent": (
        {"255": partial(byte, 255), "all 255": lambda t: t.view(torch.uint8).fill_(255).view(t.dtype), **FORM},
        {"0": partial(byte, 0), "130": partial(byte, 130)},
    ),
    "codes": ({**FORM, "as int64": lambda t: t.to(torch.int64)}, {"0": lambda t: torch.zeros_like(t)}),
    "float8": (
        {**FORM, "as int8": lambda t: t.view(torch.int8)},
        {"0": partial(byte, 0), "nan, a legal code": partial(byte, 0x7F)},
    ),
    "int4 in bytes": (
        {**FORM, "8": partial(put, 8), "-9": partial(put, -9), "127": partial(put, 127)},
        {"7": partial(put, 7)},
    ),
    "no zero point": ({"1": partial(put, 1), "-128": partial(put, -128), **FORM}, {"0": partial(put, 0)}),
    "index": (
        {**NOT_INTEGER, **FORM, "-1": partial(put, -1), "10^6": partial(put, 10**6), "all 0": torch.zeros_like},
        {},
    ),
    "table": (
        {**NOT_FINITE, **NOT_FLOAT, **FORM, "reversed": reversed_, "zeros": torch.zeros_like,
         "0.5 more": lambda t: t + 0.5, "twice": lambda t: 2 * t, "as bfloat16": partial(cast, torch.bfloat16)},
        {"the last bit": lambda t: torch.nextafter(t, torch.tensor(2.0))},
    ),
    "shape": ({**FORM, "one more": lambda t: t + 1, "-1": partial(put, -1), "2^62": partial(put, 2**62),
               "as float32": partial(cast, torch.float32)}, {}),
    "number": ({"one more": lambda t: t + 1, "-1": lambda t: t.to(torch.int32) * 0 - 1, "longer": flat_longer}, {}),
    "flag": ({"1": lambda t: torch.ones_like(t), "255": lambda t: torch.full_like(t, 255), "longer": flat_longer}, {}),
    "text": ({"other": lambda t: t ^ 1, "longer": flat_longer, "shorter": shorter}, {}),
}  # fmt: skip
"""Role -> what must be refused, and what must be let pass."""


# -- bitsandbytes' quant_state -----------------------------------------------------------------------------------------


def state_with(change: Callable[[dict[str, Any]], Any], stored: Tensor) -> Tensor:
    """Its JSON changed; `change` returns another object, or None for the one that it has changed."""
    state = json.loads(bytes(stored.tolist()))
    result = change(state)
    return as_bytes(json.dumps(state if result is None else result).encode())


def as_bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def _field(key: str, value: Any) -> Spoil:
    return partial(state_with, lambda state: state.update({key: value}))


def _without(key: str) -> Spoil:
    return partial(state_with, lambda state: state.pop(key) and None)


STATE: dict[str, Spoil] = {
    "not JSON": lambda t: as_bytes(b"{quant_type: nf4}"),
    "cut": lambda t: t[: len(t) // 2].clone(),
    "empty": lambda t: t[:0].clone(),
    "not UTF-8": lambda t: as_bytes(b"\xff\xfe{}"),
    "zeros": torch.zeros_like,
    "a list": partial(state_with, lambda state: [state]),
    "a number": lambda t: as_bytes(b"7"),
    "null": lambda t: as_bytes(b"null"),
    "deep": lambda t: as_bytes(b"[" * 4000),
    "a megabyte": lambda t: as_bytes(b" " * 1_000_000 + bytes(t.tolist())),
    "a number of 4000 digits": lambda t: as_bytes(b'{"blocksize": ' + b"9" * 4000 + b"}"),
    "as float32": partial(cast, torch.float32),
    "as int8": lambda t: t.view(torch.int8),
    **{f"without {key}": _without(key) for key in ("quant_type", "blocksize", "dtype", "shape")},
    **{f"quant_type {value!r}": _field("quant_type", value) for value in ("int8", None, 4, ["nf4"], "\x1b[2J")},
    **{f"blocksize {value!r}": _field("blocksize", value)
       for value in (0, -64, 63, 128, 64.0, "64", None, True, 2**70)},
    **{f"dtype {value!r}": _field("dtype", value)
       for value in ("load", "int8", "float8_e4m3fn", "", None, 16, {"a": 1})},
    **{f"shape {value!r}": _field("shape", value)
       for value in ([], [1], [-1, -1], [2**40, 2**40], "128", None, [[1], 2])},
}  # fmt: skip
"""Faults of any `quant_state`."""

NESTED_STATE: dict[str, Spoil] = {
    **{f"without {key}": _without(key) for key in ("nested_blocksize", "nested_dtype", "nested_offset")},
    **{f"nested_blocksize {value!r}": _field("nested_blocksize", value)
       for value in (0, -256, 128, 256.0, "256", None, True)},
    **{f"nested_dtype {value!r}": _field("nested_dtype", value) for value in ("float16", "load", None, 32)},
    **{f"nested_offset {value!r}": _field("nested_offset", value)
       for value in (math.nan, math.inf, 1e39, "0.1", None, True, [0.1], 10**400)},
}  # fmt: skip
"""Faults of one with double quantization."""

# -- the checkpoints ---------------------------------------------------------------------------------------------------

CODES, SCALES = {"qweight": "codes", "qzeros": "codes"}, {"scales": "scale"}
HQQ = {
    "W_q": "codes", "scale": "scale", "zero": "scale", "shape": "shape", "nbits": "number", "group_size": "number",
    "axis": "number", "view_as_float": "flag", "quant_scale": "flag", "quant_zero": "flag", "packing": "text",
}  # fmt: skip
BLOCK_FP8 = {"weight": "float8", "weight_scale_inv": "magnitude"}
BASES: Mapping[str, Mapping[str, str]] = {
    "nf4": {"weight": "codes", "weight.absmax": "magnitude", "weight.quant_map": "table"},
    "nf4-dq": {
        "weight": "codes",
        "weight.nested_absmax": "magnitude",
        "weight.quant_map": "table",
        "weight.nested_quant_map": "table",
    },
    "fp4": {"weight.absmax": "magnitude", "weight.quant_map": "table"},
    "int8": {"weight": "codes", "SCB": "magnitude", "weight_format": "flag"},
    "mxfp4": {"weight": "codes", "scales": "exponent"},
    "gptq/v1-4bit": {**CODES, **SCALES, "g_idx": "index"},
    "gptq/v2-3bit-act-order": {**CODES, **SCALES, "g_idx": "index"},
    "awq/gemm": {**CODES, **SCALES},
    "auto_round/auto_gptq": {**CODES, **SCALES},
    "fp8/blocks": BLOCK_FP8,
    "fp8/deepseek-v3": BLOCK_FP8,
    "fp8/ue8m0": {"weight": "float8", "weight_scale_inv": "exponent"},
    "fp8/tensor": {"weight": "float8", "weight_scale_inv": "magnitude", "activation_scale": "divisor"},
    "mxfp8": {"weight": "float8", "weight_scale_inv": "exponent"},
    "fbgemm_fp8": {"weight": "float8", "weight_scale": "magnitude"},
    "hqq/4-bits": HQQ,
    "hqq/2-bits-strided": HQQ,
    "quanto/int8": {"weight._data": "codes", "weight._scale": "magnitude", "input_scale": "shared"},
    "quanto/float8": {"weight._data": "float8", "weight._scale": "magnitude", "output_scale": "shared"},
    "quanto/int4": {"weight._data._data": "codes", "weight._scale": "magnitude", "weight._shift": "scale"},
    "torchao/int8-row": {"_weight_qdata": "codes", "_weight_scale": "magnitude", "_weight_zero_point": "no zero point"},
    "torchao/int8-tensor": {"_weight_scale": "magnitude", "_weight_zero_point": "no zero point"},
    "torchao/int4-group": {
        "_weight_qdata": "int4 in bytes",
        "_weight_scale": "magnitude",
        "_weight_zero_point": "int4 in bytes",
    },
    "torchao/fp8-row": {"_weight_qdata": "float8", "_weight_scale": "magnitude"},
    "compressed_tensors/int4": {"weight_packed": "codes", "weight_scale": "scale", "weight_shape": "shape"},
    "compressed_tensors/int4-zeros": {"weight_scale": "scale", "weight_zero_point": "codes", "weight_shape": "shape"},
    "compressed_tensors/int8-w8a8": {"weight": "codes", "weight_scale": "scale"},
    "compressed_tensors/int8-naive": {"weight_scale": "scale"},
    "compressed_tensors/fp8-block": {"weight": "float8", "weight_scale": "magnitude"},
    "compressed_tensors/fp8-static": {"weight": "float8", "weight_scale": "magnitude", "input_scale": "shared"},
}
"""Checkpoint -> suffixes of its components, and their roles."""

NEEDLESS = {
    ("compressed_tensors/int4", "weight_shape"),
    ("compressed_tensors/int4-zeros", "weight_shape"),
    ("gptq/v1-4bit", "g_idx"),
    ("hqq/4-bits", "shape"),
    ("hqq/2-bits-strided", "shape"),
}
"""Components that say again what the model says."""


def cases(base: str) -> Iterator[Case]:
    """Yields the cases of a checkpoint."""
    for suffix, role in BASES[base].items():
        refused, legal = ROLES[role]
        for name, spoil in refused.items():
            yield Case(base, suffix, name, spoil, legal=name == "gone" and (base, suffix) in NEEDLESS)
        yield from (Case(base, suffix, name, spoil, legal=True) for name, spoil in legal.items())
    if base in ("nf4", "nf4-dq", "fp4"):
        suffix = f"weight.quant_state.bitsandbytes__{base[:3]}"
        states = STATE | (NESTED_STATE if base == "nf4-dq" else {})
        yield from (Case(base, suffix, name, spoil) for name, spoil in states.items())


GGUF = ("Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types of blocks."""


def gguf_cases() -> Iterator[tuple[Case, int]]:
    """Yields cases of GGUF files of one type each (`base`), and the byte of a block at which the float16 is."""
    for kind in GGUF:
        for offset in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,)):
            for tensor in ("blk.0.ffn_down.weight", "token_embd.weight"):
                for name, spoil in {**NOT_FINITE, **LITTLE, "-1": partial(put, -1.0)}.items():
                    yield Case(kind, tensor, f"{name} at byte {offset}", spoil, legal=name not in NOT_FINITE), offset


def spoilt_gguf(file: Path, case: Case, offset: int, target: Path) -> None:
    """Writes a copy with one block's float16 changed."""
    from gguf import GGUFReader

    shutil.copy(file, target)
    place = next(int(each.data_offset) for each in GGUFReader(file).tensors if each.name == case.suffix) + offset
    with open(target, "r+b") as out:
        out.seek(place)
        stored = torch.frombuffer(bytearray(out.read(2)), dtype=torch.float16)
        changed = case.spoil(stored)
        assert changed is not None
        out.seek(place)
        out.write(changed.numpy().tobytes())


def write_base(base: str, model: str, folder: Path) -> Path:
    """Writes a checkpoint of the data beside the tests, or quantizes a model in its method."""
    if (DATA / base).is_dir():
        shutil.copytree(DATA / base, folder)
        return folder
    from models import save_as_stored

    import distquant as dq

    save_as_stored(dq.load(model, quantization_config=base), folder)
    return folder


def spoilt(folder: Path, case: Case, target: Path) -> str:
    """Writes a copy with the case's tensor changed, one weight of many; returns the name of its module."""
    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    named = [name for name in tensors if name.endswith(f".{case.suffix}") and ".mlp.down_proj." in name]
    changed = case.spoil(tensors.pop(named[0]))
    if changed is not None:
        tensors[named[0]] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return named[0].removesuffix(f".{case.suffix}")
