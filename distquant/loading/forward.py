"""Chooses what multiplies quantized weights, once a model is there; the report says it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from distquant.errors import InputError, Problem
from distquant.loading.devices import Devices
from distquant.loading.local_modules import shard_of
from distquant.options import Forward
from distquant.parallel.expert_stack import ExpertStack
from distquant.planning.load_plan import LoadPlan
from distquant.quantization import Scheme
from distquant.quantization.linear import gptqmodel_matmul
from distquant.quantization.linear.float8_matmul import Float8Kernel, Float8Multiplier, is_float8, missing, taken
from distquant.quantization.linear.quantized_linear import QuantizedLinear
from distquant.quantization.packed_int import PackedIntScheme
from distquant.sharding.device_map import is_offloaded

DEQUANTIZED = "dequantized and multiplied"

PACKAGES = {"optimum": "optimum-quanto"}
"""Packages by the first part of their modules' path, where the two differ."""

FIX = "Take 'auto' or 'dequantize'"
"""Advice where there is no such product."""


def check_forward(plan: LoadPlan, scheme: Scheme, forward: Forward, device: torch.device) -> None:
    """Raises `InputError` where another way to multiply is asked for than there is."""
    if forward is Forward.FLOAT8:
        _check_float8(plan, scheme, device)
    elif forward is Forward.GPTQMODEL:
        _check_gptqmodel(plan, scheme, device)
    elif forward.tries(Forward.GPTQMODEL, device) and not plan.dequantize and isinstance(scheme, PackedIntScheme):
        gptqmodel_matmul.missing()  # imports it, before the load is timed


def _float8_kernel(scheme: Scheme, name: str) -> Float8Kernel | None:
    return scheme.float8_kernel(name) if isinstance(scheme, Float8Multiplier) else None


def _check_float8(plan: LoadPlan, scheme: Scheme, device: torch.device) -> None:
    kernels = set() if plan.dequantize else {_float8_kernel(scheme, f"{name}.weight") for name in plan.converted}
    reasons = [missing(kernel, device) for kernel in kernels if kernel is not None]
    if not reasons:
        fault = (
            "'float8' is for float8 weights with float8 inputs, with a scale for each row, for all, or for 128 x 128"
        )
        raise InputError.one("forward", f"{fault}; {scheme.name} as it is configured has none", FIX)
    if None not in reasons:
        raise InputError.one("forward", f"'float8' cannot be: {'; '.join(map(str, reasons))}", FIX)


def _check_gptqmodel(plan: LoadPlan, scheme: Scheme, device: torch.device) -> None:
    """Checks the parts of all ranks, so that all ranks give the same answer."""
    if plan.dequantize or not plan.converted or not isinstance(scheme, PackedIntScheme):
        fault = "'gptqmodel' is for weights that are kept in the layouts of GPTQ and AWQ"
        raise InputError.one("forward", f"{fault}; {scheme.name} as it is configured has none", FIX)
    device_map = plan.device_map or {}
    if any(is_offloaded(device_map, place) for place in device_map.values()):
        fault = "'gptqmodel' cannot be with a device map that offloads: a kernel stays where it was made"
        raise InputError.one("forward", fault, FIX)
    if (reason := gptqmodel_matmul.missing()) is not None:
        raise InputError.one("forward", f"'gptqmodel' cannot be: {reason}", FIX)
    devices = Devices(device, plan.device_map)
    found: dict[Any, str | None] = {}
    names: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if tensor.scheme != "none" and tensor.experts is None:
            reasons, place = set(), devices.of(tensor.name)
            for shard in (shard_of(tensor, plan, rank) for rank in range(plan.mesh.tp)):
                key = scheme.packing(shard.name), shard.dtype, shard.shape, shard.local_shape, place
                if key not in found:
                    found[key] = gptqmodel_matmul.why_not(scheme, shard, place, False)
                reasons.add(found[key])
            for reason in reasons - {None}:
                names.setdefault(str(reason), []).append(tensor.name)
    if names:
        fault = "'gptqmodel' has no kernel for {} ({} weights): {}"
        raise InputError(
            [Problem("forward", fault.format(of[0], len(of), reason), FIX) for reason, of in names.items()]
        )


def set_forward(model: nn.Module, scheme: Scheme, forward: Forward, devices: Devices) -> str:
    """Chooses for every quantized module; returns the products and their numbers of modules, for people.

    Offloaded weights are dequantized: a kernel of another library stays where it was made.

    Raises:
        InputError: gptqmodel's kernels are asked for, and none multiplies a module's weight.
    """
    counts: Counter[str] = Counter()
    for module in model.modules():
        reason = ""
        if isinstance(module, QuantizedLinear):
            name = module.shard.name
            device, kernel = devices.runs_on(name), _float8_kernel(scheme, name)
            module.float8 = kernel is not None and is_float8(forward, kernel, module.shard.local_shape, device)
            if not devices.is_offloaded(name):
                reason = _take_gptqmodel(module, forward, device)
        if (way := _multiplied_by(module, scheme, devices)) is not None:
            counts[f"{way} ({reason})" if reason else way] += 1
    return "; ".join(f"{name}: {count} modules" for name, count in counts.items())


def _take_gptqmodel(module: QuantizedLinear, forward: Forward, device: torch.device) -> str:
    """Lets one of gptqmodel's kernels multiply a module's weight; returns why none does, where one is expected."""
    asked = forward is Forward.GPTQMODEL
    if not forward.tries(Forward.GPTQMODEL, device) or not isinstance(module.scheme, PackedIntScheme):
        return ""
    if not asked and gptqmodel_matmul.missing() is not None:
        return ""
    reason = gptqmodel_matmul.take_kernel(module, keep=not asked)
    if reason is not None and asked:
        raise InputError.one("forward", f"gptqmodel has no kernel for {module.shard.name}: {reason}", FIX)
    return reason or ""


def _multiplied_by(module: Any, scheme: Scheme, devices: Devices) -> str | None:
    """Returns what multiplies a module's weights, if they are quantized."""
    if isinstance(module, QuantizedLinear):
        if module.kernel is not None:
            return str(module.kernel)
        kernel = _float8_kernel(scheme, module.shard.name) if module.float8 else None
        if kernel is None:
            return DEQUANTIZED
        kernel, reason = taken(kernel, devices.runs_on(module.shard.name))
        return f"{kernel.value} with float8 activations" + (f" ({reason})" if reason else "")
    if isinstance(module, ExpertStack):
        return "experts, dequantized and multiplied"
    weight = module._parameters.get("weight", getattr(module, "W_q", None))
    for kind in (*type(module).__mro__, type(weight)):
        package = kind.__module__.partition(".")[0]
        if package in ("bitsandbytes", "torchao", "hqq", "optimum"):
            return f"the modules of {PACKAGES.get(package, package)}"
    return None
