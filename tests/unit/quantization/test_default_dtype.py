"""The same bits whatever torch's default dtype is, which belongs to the user (and to whoever builds a model)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import distquant as dq

pytestmark = pytest.mark.wide

QUANTS = ("awq-rtn", "fbgemm_fp8", "fp4-dq", "fp8", "hqq", "int4", "int8", "mxfp4", "mxfp8", "nf4-dq")
"""Methods whose arithmetic is distquant's own, and hqq's, which is split up here."""


def fingerprints(path: str) -> dict[str, Any]:
    """By the fastest kernels and by the reference's, of all methods."""
    found = {}
    for quant in QUANTS:
        plan = dq.plan(path, quantization_config=quant, dtype="bfloat16")
        found[quant] = [dq.fingerprint(dq.load(plan, kernel=kernel)) for kernel in ("auto", "reference")]
    return found


def test_the_default_dtype_leaves_no_trace(model_of) -> None:
    """In a process of its own: tables that kernels look up are made once."""
    path = model_of("qwen2-biases")
    done = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == fingerprints(path)


if __name__ == "__main__":
    import torch

    torch.set_default_dtype(torch.bfloat16)
    print(json.dumps(fingerprints(sys.argv[1])))
