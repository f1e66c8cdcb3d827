"""Counts the kernels that pieces compile after a load's kernels were warmed up: none. Prints a line of JSON.

    python tests/kernel_warmth.py MODEL METHOD...

For each method, by Triton's own launch up to the launch itself, for a GPU that is not here: the number of kernels after
the warm-up, and after pieces of many numbers of rows have been encoded.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch
import triton
from kernel_ptx import Elsewhere, take_any_device
from triton.runtime.jit import JITFunction

import distquant as dq
from distquant.config import torch_dtype
from distquant.kernels import gpu
from distquant.loading.loader import scheme_of
from distquant.loading.warm_up import warm_up

CPU = torch.device("cpu")


def main() -> None:
    compile_only, kernels = JITFunction.run, set()

    def launch(kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
        kernels.add(kernel)
        compile_only(kernel, *args, **{**options, "warmup": True})

    def count() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    JITFunction.run = launch
    take_any_device()
    triton.runtime.driver.set_active(Elsewhere(90))
    path, *methods = sys.argv[1:]
    found = {}
    for method in methods:
        plan = dq.plan(path, quantization_config=method)
        scheme = scheme_of(plan)
        before = count()
        warm_up(plan, scheme, CPU, gpu)
        warm = count()
        for tensor in plan.tensors:
            if tensor.scheme == "none":
                continue
            columns = tensor.shape[1]
            for rows in (1, 2, 3, 15, 16, 17, 64):
                weight = torch.ones((rows, columns), dtype=torch_dtype(tensor.dtype))
                components = scheme.encoded_components(tensor.name, (rows, columns), tensor.dtype)
                shapes = {c.name: (math.prod(c.shape((rows, columns))), torch_dtype(c.dtype)) for c in components}
                out = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes.items()}
                scheme.encode(tensor.name, weight, out, gpu)
        found[method] = [warm - before, count() - warm]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
