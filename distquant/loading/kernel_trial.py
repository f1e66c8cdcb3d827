"""Checks, before anything is read, that the kernels of a load run on its devices."""

from __future__ import annotations

import torch

from distquant.errors import Problems
from distquant.kernels.choice import Kernel, choose
from distquant.kernels.compiler_trial import triton_problem
from distquant.loading.devices import Devices
from distquant.planning.load_plan import LoadPlan


def check_compiles(plan: LoadPlan, kernel: Kernel | str, device: torch.device) -> None:
    """Raises `InputError` where Triton is to quantize or to dequantize, and cannot compile."""
    devices = Devices(device, plan.device_map)
    problems = Problems()
    for used in devices.accelerators(tensor.name for tensor in plan.tensors if tensor.scheme != "none"):
        if choose(kernel, used).kernel is Kernel.TRITON and (problem := triton_problem(used)) is not None:
            problems.extend([problem])
            break  # a compiler is missing for all devices alike
    problems.raise_if_any()
