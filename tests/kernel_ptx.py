"""Compiles the Triton kernels for GPUs that are not here, and prints what each came to, in a line of JSON.

    python tests/kernel_ptx.py 90 100

For every capability, kernel and set of options that the calls below lead to, by Triton's own way up to the launch: the
kinds of instructions in its PTX that would break bit-equality (approximate division, flushing of subnormals, fused
product and sum), and the bytes that ptxas spills to memory for lack of registers. Sizes and addresses are multiples of
nothing, which needs the most registers.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections import defaultdict
from contextlib import nullcontext, redirect_stdout
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from distquant.kernels import gpu
from distquant.kernels.gpu import blockwise, four_bit, fp8, groups, int8, mxfp4, scaled_rows

FORBIDDEN = re.compile(r"\b(?:div\.(?:full|approx)|rcp\.approx|fma\.|[\w.]+\.ftz)[\w.]*")
SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")


class Elsewhere:
    """Driver that names a device of a given capability: all that Triton asks of one to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Takes the place of launches: compiles instead, and keeps what is found."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = defaultdict(lambda: {"instructions": [], "spilled": 0})
        self.run = JITFunction.run

    def launch(self, kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
        log = io.StringIO()
        with redirect_stdout(log):
            made = self.run(kernel, *map(unaligned, args), **{**options, "warmup": True})
        if not log.getvalue():  # compiled before
            return
        fixed = sorted((k, str(v)) for k, v in options.items() if k not in ("grid", "warmup", "enable_fp_fusion"))
        capability = triton.runtime.driver.active.get_current_device()
        name = f"sm_{capability} {kernel.fn.__module__}.{kernel.fn.__name__} {fixed}"
        entry = self.found[name]  # one for all specializations of the arguments
        entry["instructions"] = sorted({*entry["instructions"], *FORBIDDEN.findall(made.asm["ptx"])})
        entry["spilled"] = max(entry["spilled"], *map(int, SPILLS.findall(log.getvalue())))


def unaligned(value: Any) -> Any:
    """An argument in place of `value` of which Triton knows nothing: each element then needs its own address."""
    if isinstance(value, torch.Tensor):
        return torch.empty(2, dtype=value.dtype)[1:]
    return 1001 if isinstance(value, int) and value < 2**31 else value


def take_any_device() -> None:
    """Lets kernels be called with tensors of a CPU."""
    for module in (blockwise, four_bit, fp8, groups, int8, mxfp4, scaled_rows):
        module.on = lambda weight: nullcontext()


def main() -> None:
    compiler = Compiler()
    JITFunction.run = lambda kernel, *args, **options: compiler.launch(kernel, *args, **options)
    triton.knobs.nvidia.dump_ptxas_log = True
    take_any_device()
    for capability in map(int, sys.argv[1:]):
        triton.runtime.driver.set_active(Elsewhere(capability))
        calls(torch.bfloat16)
    json.dump(compiler.found, sys.stdout)


def calls(dtype: torch.dtype) -> None:
    """One call of each kind, and of each shape that makes another kernel of it."""
    weight = torch.ones(130, 256, dtype=dtype)
    for quant_type in ("nf4", "fp4"):
        codes, absmax = gpu.quantize_4bit(weight[:, :9].reshape(-1), 64, quant_type)
        gpu.encode_4bit(weight[:, :9].reshape(-1), absmax, 64, quant_type)
    for blocksize in (32, 4096):
        gpu.quantize_4bit(weight, blocksize, "nf4")
    gpu.dequantize_4bit(codes, absmax, 64, "nf4", (130, 9), dtype)
    gpu.encode_int8_rows(weight, gpu.quantize_int8_rows(weight)[1])
    for columns in (1, 4096, 8192, 9000):
        gpu.quantize_int8_rows(torch.ones(1, columns, dtype=dtype))
    for block in ((None, None), (1, None), (128, 128), (1, 32), (3, 24)):
        gpu.dequantize_fp8(*gpu.quantize_fp8(weight, block), block, dtype)
    for columns in (4096, 8192, 16384, 32768, 33000):
        gpu.quantize_fp8(torch.ones(2, columns, dtype=dtype), (1, None))
    for columns in (256, 33000):
        gpu.quantize_fp8_rows(torch.ones(2, columns, dtype=dtype))
    gpu.quantize_fp8_ue8m0(weight, (128, 128))
    gpu.quantize_fp8_ue8m0(weight, (1, 32))
    for code in (torch.int8, torch.float8_e4m3fn):
        gpu.encode_scaled_rows(weight, torch.ones(130), code)
        gpu.encode_scaled_rows(weight, torch.ones(130), code, rounded=True)
    gpu.encode_scaled_rows(weight, torch.ones(130), torch.int8, inverse=True)
    for bits, symmetric in ((4, True), (4, False), (8, False)):
        for group in (32, 128, 4096):
            gpu.dequantize_groups(*gpu.quantize_groups(weight, group, bits, symmetric), group, dtype)
    gpu.dequantize_mxfp4(*gpu.quantize_mxfp4(weight), dtype)
    for blocksize in (100, 256, 4096):
        gpu.quantize_blockwise(weight, torch.linspace(-1, 1, 256), blocksize)


if __name__ == "__main__":
    main()
