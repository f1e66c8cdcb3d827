"""What ranks do with checkpoints that are stored in words."""

from __future__ import annotations

from typing import Any

import torch
import work
from torch import Tensor

import distquant as dq


def logits(path: str, mesh: str | None = None) -> Tensor:
    """Of a checkpoint as it is stored, in float32."""
    with torch.no_grad():
        return dq.load(path, mesh=mesh, dtype="float32")(torch.tensor(work.IDS)).logits


def stored(path: str, quant: Any, mesh: str | None = None) -> tuple[dict[str, dict[str, Tensor]], int, int, str]:
    """This rank's components by module, the bytes that it says it holds quantized, the planned ones, fingerprint."""
    model = dq.load(path, quantization_config=quant, mesh=mesh)
    plan = model.distquant.plan
    found = {name: model.get_submodule(name).components for name in plan.converted}
    return found, model.distquant.report.quantized_bytes, plan.memory[work.rank()].quantized, dq.fingerprint(model)


def by_gptqmodel(path: str, mesh: str | None = None) -> tuple[Tensor, str, str]:
    """Logits of products by gptqmodel's kernels, what multiplied, and the fingerprint after it."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = dq.load(path, mesh=mesh, dtype="bfloat16", forward="gptqmodel")
        found = model(torch.tensor(work.IDS)).logits.float()
    return found, model.distquant.report.forward, dq.fingerprint(model)
