"""Compiles a load's Triton kernels in a thread, while the model is built and the first bytes are read.

Triton compiles a kernel when it is first launched, for the length of a row: the first piece of every kind of weight
would wait for that, a second or more each. What is compiled here is what the scheme calls for a few rows of each.
Triton specializes nothing on the number of rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from distquant.config import torch_dtype
from distquant.kernels.choice import Choice, Kernel
from distquant.kernels.protocol import Kernels
from distquant.planning.expert_parallel import first_expert
from distquant.planning.load_plan import LoadPlan
from distquant.quantization import Scheme
from distquant.quantization.codec import Encoder

ROWS = 16
"""Rows that are encoded, or as many more as a block of the method has."""


@contextmanager
def warming_up(plan: LoadPlan, scheme: Scheme, device: torch.device, choice: Choice) -> Iterator[None]:
    """Compiles while the block runs; where nothing is to be compiled it does nothing.

    Args:
        plan: of the load.
        scheme: of the plan.
        device: on which weights are quantized.
        choice: the kernels there.
    """
    if choice.kernel is not Kernel.TRITON or device.type == "cpu" or not isinstance(scheme, Encoder):
        yield
        return
    ended = threading.Event()
    with ThreadPoolExecutor(1, "compiling-kernels") as pool:
        compiled = pool.submit(warm_up, plan, scheme, device, choice.ops, ended.is_set)
        try:
            yield
        finally:
            ended.set()
        compiled.result()


def warm_up(
    plan: LoadPlan, scheme: Scheme, device: torch.device, ops: Kernels, ended: Callable[[], bool] = lambda: False
) -> int:
    """Encodes a few rows of each kind of weight; returns the number of kinds.

    Memory that the load itself needs is not waited for: if the device has none left, kernels are compiled when they are
    needed.
    """
    assert isinstance(scheme, Encoder)
    done = set()
    for tensor in map(first_expert, () if plan.prequantized else plan.tensors):
        if ended():
            break
        if tensor.scheme == "none":
            continue
        rows, columns = tensor.shape
        if scheme.whole_weight_workspace(tensor.name, (rows, columns)):
            continue  # quantized in one piece, by torch's own operations
        whole = scheme.encoded_components(tensor.name, (rows, columns), tensor.dtype)
        step = math.lcm(*(component.alignments((rows, columns), 0)[-1] for component in whole))
        count = min(-(-ROWS // step) * step, rows)
        components = scheme.encoded_components(tensor.name, (count, columns), tensor.dtype)
        kind = (columns, tensor.dtype, components)
        if kind in done:
            continue
        done.add(kind)
        try:
            weight = torch.zeros((count, columns), dtype=torch_dtype(tensor.dtype), device=device)
            out = {
                c.name: torch.empty(math.prod(c.shape((count, columns))), dtype=torch_dtype(c.dtype), device=device)
                for c in components
            }
            scheme.encode(tensor.name, weight, out, ops)
        except torch.OutOfMemoryError:
            break
    return len(done)
