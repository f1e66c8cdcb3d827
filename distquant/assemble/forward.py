"""What multiplies quantized weights: decided once a model is there, and told in the report."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from distquant.assemble.expert_stack import ExpertStack
from distquant.errors import InputError
from distquant.options import Forward
from distquant.planning.load_plan import LoadPlan
from distquant.schemes import Scheme
from distquant.schemes.float8_product import is_float8, missing
from distquant.schemes.quantized_linear import QuantizedLinear

DEQUANTIZED = "dequantized and multiplied"

PACKAGES = {"optimum": "optimum-quanto"}
"""Packages by the first part of their modules' path, where the two differ."""


def refuse_forward(plan: LoadPlan, scheme: Scheme, forward: Forward, device: torch.device) -> None:
    """Raises `InputError` where products in float8 are asked for that cannot be."""
    if forward is not Forward.FLOAT8:
        return
    fix = "Take 'auto' or 'dequantize'"
    kernels = set() if plan.dequantize else {scheme.float8_kernel(f"{name}.weight") for name in plan.converted}
    reasons = [missing(kernel, device) for kernel in kernels if kernel is not None]
    if not reasons:
        what = "'float8' is for float8 weights with float8 inputs, with a scale for each row, for all, or for 128 x 128"
        raise InputError.one("forward", f"{what}; {scheme.name} as it is configured has none", fix)
    if None not in reasons:
        raise InputError.one("forward", f"'float8' cannot be: {'; '.join(map(str, reasons))}", fix)


def set_forward(model: nn.Module, scheme: Scheme, forward: Forward) -> str:
    """Decides for every quantized module; returns what multiplies how many, for people."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            device, kernel = next(iter(module.components.values())).device, scheme.float8_kernel(module.shard.name)
            module.float8 = kernel is not None and is_float8(forward, kernel, module.shard.local_shape, device)
        if (name := _multiplied_by(module, scheme)) is not None:
            counts[name] += 1
    return "; ".join(f"{name}: {count} modules" for name, count in counts.items())


def _multiplied_by(module: Any, scheme: Scheme) -> str | None:
    """What multiplies a module's weights, where they are quantized."""
    if isinstance(module, QuantizedLinear):
        kernel = scheme.float8_kernel(module.shard.name) if module.float8 else None
        return f"{kernel.value} with float8 activations" if kernel is not None else DEQUANTIZED
    if isinstance(module, ExpertStack):
        return "experts, dequantized and multiplied"
    weight = module._parameters.get("weight", getattr(module, "W_q", None))
    for kind in (*type(module).__mro__, type(weight)):
        package = kind.__module__.partition(".")[0]
        if package in ("bitsandbytes", "torchao", "hqq", "optimum"):
            return f"the modules of {PACKAGES.get(package, package)}"
    return None
