"""What ranks do with mixtures of experts."""

from __future__ import annotations

from typing import Any

import compressed
import torch
import work
from torch import Tensor

import distquant as dq
from distquant.quantization import Shard

METHODS: dict[str, Any] = {
    "none": "none",
    "nf4": work.bnb("nf4"),
    "nf4-dq": work.bnb("nf4-dq"),
    "int8": "int8",
    "fp8": {"quant_method": "fp8", "weight_block_size": [16, 32]},
    "fp8-row": "fp8-row",
    "int4": compressed.WAYS["int4"],
    "mxfp4": "mxfp4",
}
"""Methods that experts can be kept in; tiles and groups small enough for the models here to be cut."""

MESHES = {"ep=2": 2, "ep=3": 3, "tp=2": 2, "tp=3": 3, "ep=2,tp=2": 4, "ep=4": 4, "dp=2,ep=2": 4}
"""Mesh -> ranks."""
EVERY, MOST, SOME = tuple(MESHES), tuple(MESHES)[:5], ("ep=3", "tp=2", "ep=2,tp=2")
"""Meshes for one family, for all, and for all methods: experts dealt out unevenly, cut, and both."""

Job = tuple[str, Any]
"""Path of a checkpoint, and how it is quantized (None: as it says)."""


def fingerprints(jobs: list[Job], mesh: str | None = None, kwargs: dict[str, Any] | None = None) -> list[str]:
    return [work.fingerprint(path, quant, mesh, **(kwargs or {})) for path, quant in jobs]


def logits(jobs: list[Job], mesh: str | None = None, kwargs: dict[str, Any] | None = None) -> list[Tensor]:
    """Of the two prompts, in float32 throughout."""
    found = []
    for path, quant in jobs:
        model = dq.load(path, quantization_config=quant, mesh=mesh, dtype="float32", **(kwargs or {}))
        with torch.no_grad():
            found.append(model(torch.tensor(work.IDS)).logits)
    return found


def sizes(jobs: list[Job], mesh: str | None = None) -> list[dict[str, int]]:
    """What this rank's plan and its report say of bytes, read through the page cache: past it, pages are read whole."""
    found = []
    for path, quant in jobs:
        model = dq.load(path, quantization_config=quant, mesh=mesh, io="buffered")
        planned, report = model.distquant.plan.memory[work.rank()], model.distquant.report
        row = {"planned": planned.finished, "planned quantized": planned.quantized, "planned read": planned.read}
        row |= {"reported": report.quantized_bytes + report.unquantized_bytes}
        found.append(row | {"quantized": report.quantized_bytes, "read": report.bytes_read})
    return found


def bytes_of_experts(path: str, quant: Any) -> tuple[int, int]:
    """Bytes of all buffers of all stacks, and what the plan's method says of its experts, on one rank."""
    model = dq.load(path, quantization_config=quant)
    plan, scheme = model.distquant.plan, model.distquant.scheme
    stacks = [module for module in model.modules() if type(module).__name__ == "ExpertStack"]
    planned = 0
    for tensor in plan.tensors:
        if tensor.experts is not None and tensor.scheme != "none":
            count, rows, columns = tensor.shape
            planned += count * scheme.shard_nbytes(Shard(tensor.name, (rows, columns), tensor.dtype))
    return sum(value.nbytes for stack in stacks for value in stack.buffers()), planned


def held_experts(path: str, quant: Any, mesh: str | None = None) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """This rank's experts by the name of their weight: dequantized, and as they are stored."""
    model = dq.load(path, quantization_config=quant, mesh=mesh)
    found = {}
    for tensor in model.distquant.plan.tensors:
        if tensor.experts is None or tensor.scheme == "none":
            continue
        module, _, leaf = tensor.name.partition(".*.")
        experts = model.get_submodule(module)
        stack = experts.stack(leaf.removesuffix(".weight"))
        for number in range(experts.last - experts.first):
            name = f"{module}.{experts.first + number}.{leaf}"
            found[name] = (stack.dequantized(number).clone(), stack.components(number))
    return found


def own_fingerprint(plans: list[dq.LoadPlan]) -> str:
    """Of this rank's own plan."""
    return dq.fingerprint(work.load_planned(plans))
