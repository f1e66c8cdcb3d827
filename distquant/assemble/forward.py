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
from distquant.schemes.float8_product import CAPABILITY, is_float8, runs_float8
from distquant.schemes.quantized_linear import QuantizedLinear

FLOAT8 = "torch's scaled_mm with float8 activations"
DEQUANTIZED = "dequantized and multiplied"

PACKAGES = {"optimum": "optimum-quanto"}
"""Packages by the first part of their modules' path, where the two differ."""


def refuse_forward(plan: LoadPlan, scheme: Scheme, forward: Forward, device: torch.device) -> None:
    """Raises `InputError` where products in float8 are asked for that cannot be."""
    if forward is not Forward.FLOAT8:
        return
    fix = "Take 'auto' or 'dequantize'"
    if plan.dequantize or not any(map(scheme.multiplies_float8, plan.converted)):
        what = "'float8' is for float8 weights with a scale for each row or for all, and activations meant to be float8"
        raise InputError.one("forward", f"{what}; {scheme.name} as it is configured has none", fix)
    if device.type != "cpu" and not runs_float8(device):
        what = f"'float8' does not run on {device}, it needs compute capability {'.'.join(map(str, CAPABILITY))}"
        raise InputError.one("forward", what, fix)


def set_forward(model: nn.Module, scheme: Scheme, forward: Forward) -> str:
    """Decides for every quantized module; returns what multiplies how many, for people."""
    counts: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            device = next(iter(module.components.values())).device
            able = scheme.multiplies_float8(module.shard.name)
            module.float8 = able and is_float8(forward, module.shard.local_shape, device)
        if (name := _multiplied_by(module)) is not None:
            counts[name] += 1
    return "; ".join(f"{name}: {count} modules" for name, count in counts.items())


def _multiplied_by(module: Any) -> str | None:
    """What multiplies a module's weights, where they are quantized."""
    if isinstance(module, QuantizedLinear):
        return FLOAT8 if module.float8 else DEQUANTIZED
    if isinstance(module, ExpertStack):
        return "experts, dequantized and multiplied"
    weight = module._parameters.get("weight", getattr(module, "W_q", None))
    for kind in (*type(module).__mro__, type(weight)):
        package = kind.__module__.partition(".")[0]
        if package in ("bitsandbytes", "torchao", "hqq", "optimum"):
            return f"the modules of {PACKAGES.get(package, package)}"
    return None
