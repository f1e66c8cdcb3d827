"""The table of dtypes agrees with safetensors and torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from distquant.dtypes import DTYPE_BITS, DTYPE_BYTES, LOAD_DTYPES, STORED_NAMES, TORCH_NAMES, dtype_name


@pytest.mark.parametrize("stored", TORCH_NAMES)
def test_names_are_those_that_safetensors_writes(stored: str, tmp_path: Path) -> None:
    dtype = getattr(torch, TORCH_NAMES[stored])
    save_file({"x": torch.zeros(3).to(dtype)}, tmp_path / "x.safetensors")
    ((_, tensor),) = safetensors.deserialize((tmp_path / "x.safetensors").read_bytes())
    assert tensor["dtype"] == stored
    assert dtype.itemsize * 8 == DTYPE_BITS[stored]


def test_tables_agree() -> None:
    assert {STORED_NAMES[name] for name in DTYPE_BYTES} == TORCH_NAMES.keys() < DTYPE_BITS.keys()
    assert set(LOAD_DTYPES) < DTYPE_BYTES.keys()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("torch.bfloat16", "bfloat16"),
        (torch.float32, "float32"),
        ("int3", "int3"),
    ],
)
def test_spellings_of_dtypes(given, name):
    assert dtype_name(given) == name
