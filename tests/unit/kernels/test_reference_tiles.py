"""Loops over tiles that fit a CPU's cache are none on other devices: each round would be launches of small kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distquant.kernels import reference
from distquant.kernels.reference.tiles import DEVICE_TILE, TILE
from distquant.quantization.algorithms.rtn import rows_at_once

ROWS, COLUMNS = 64, DEVICE_TILE // 64

CALLS = {
    "rows under scales, int8": lambda w, row: reference.encode_scaled_rows(w, row, torch.int8),
    "rows under scales, float8": lambda w, row: reference.encode_scaled_rows(w, row, torch.float8_e4m3fn),
    "float8 tiles": lambda w, row: reference.encode_fp8(w, row.view(-1, 1), (1, None)),
    "int8 rows": lambda w, row: reference.encode_int8_rows(w, row),
    "four bits": lambda w, row: reference.encode_4bit(w, torch.ones(w.numel() // 64, device=w.device), 64, "nf4"),
    "mxfp4": lambda w, row: reference.quantize_mxfp4(w),
    "groups": lambda w, row: reference.quantize_groups(w, 64, 4, False),
}


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_a_device_works_on_a_whole_piece_at_once(name):
    counts = {}
    for rows in (1, 1, ROWS):  # the first call of all also makes tables
        weight = torch.empty(rows, COLUMNS, dtype=torch.bfloat16, device="meta")
        with Counting() as counting:
            CALLS[name](weight, torch.ones(rows, device="meta"))
        counts[rows] = counting.calls.total()
    assert counts[ROWS] == counts[1]


def test_a_cpu_works_on_what_its_cache_holds():
    assert rows_at_once(1024, torch.device("cpu")) == TILE // 1024
    assert rows_at_once(1024, torch.device("cuda"), 8) == DEVICE_TILE // 1024
