"""What tests of kernels do where `sim` is a device; see `on_sim.py`."""

from __future__ import annotations

from typing import Any

import torch
from on_sim import faults

import distquant as dq
from distquant.kernels import reference
from distquant.loading.loader import load_shard
from distquant.parallel.comm import SoloComm
from distquant.quantization.algorithms.hqq_optimizer import quantize_hqq


def copied(direction: str) -> int:
    """Bytes copied in a direction, "D2H" or "H2D", since the counts were reset."""
    import _sim

    return sum(count[1] for what, count in _sim.counts().items() if what.startswith(direction))


def hqq(shape: tuple[int, int], axis: int, optimize: bool) -> dict[str, Any]:
    """Quantizes a weight where it is and on the CPU."""
    import _sim

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul_(0.02).bfloat16()
    expected = torch.empty(weight.numel(), dtype=torch.uint8)
    statistics = quantize_hqq(weight, 4, 64, axis, optimize, True, expected)
    there = weight.to("sim:0")
    codes = torch.empty(weight.numel(), dtype=torch.uint8, device="sim:0")
    _sim.reset_counts()
    found = quantize_hqq(there, 4, 64, axis, optimize, True, codes)
    to_host = copied("D2H")
    return {
        "on": {str(tensor.device) for tensor in found},
        "equal": [torch.equal(a.cpu(), b) for a, b in zip((codes, *found), (expected, *statistics), strict=True)],
        "to host": to_host,
        "faults": faults(),
    }


def rows_and_tiles(rows: int, columns: int) -> dict[str, Any]:
    """Codes by the reference on the device, under a scale for each row and in tiles, against the CPU's."""
    weight = torch.randn((rows, columns), generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = reference.row_absmax(weight.float()) / 127
    there, scale_there = weight.to("sim:0"), scale.to("sim:0")
    pairs = [
        (
            reference.encode_scaled_rows(there, scale_there, torch.int8),
            reference.encode_scaled_rows(weight, scale, torch.int8),
        ),
        *zip(reference.quantize_fp8(there, (128, 128)), reference.quantize_fp8(weight, (128, 128)), strict=True),
        *zip(reference.quantize_fp8_rows(there), reference.quantize_fp8_rows(weight), strict=True),
    ]
    return {"equal": [torch.equal(a.cpu().float(), b.float()) for a, b in pairs], "faults": faults()}


def loaded(path: str, quant: str) -> dict[str, Any]:
    """Loads a model onto the device and onto the CPU."""
    plan = dq.plan(path, quantization_config=quant)
    on_cpu, model = (load_shard(plan, SoloComm(), device) for device in ("cpu", "sim:0"))
    return {"equal": dq.fingerprint(model) == dq.fingerprint(on_cpu), "faults": faults()}
