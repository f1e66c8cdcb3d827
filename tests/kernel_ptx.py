"""Compiles the Triton kernels for a GPU of capability 9.0 without one, and prints a JSON line of what each came to.

For every kernel and set of options that the calls below lead to: the kinds of instructions that would break
bit-equality and are in its PTX: approximate division, flushing of subnormals, fused product and sum.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distquant.kernels import gpu
from distquant.kernels.gpu import blockwise, four_bit, fp8, groups, int8, mxfp4

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.int16: "*i16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
}
FORBIDDEN = re.compile(r"\b(?:div\.(?:full|approx)|rcp\.approx|fma\.|[\w.]+\.ftz)[\w.]*")


def described(value: Any) -> str:
    """The type of an argument as a signature has it."""
    if isinstance(value, torch.Tensor):
        return NAMES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    launch = {name: options.pop(name) for name in ("enable_fp_fusion", "num_warps") if name in options}
    signature = dict(zip(kernel.arg_names, map(described, args), strict=False))
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items()}
    signature |= dict.fromkeys(options, "constexpr")
    return triton.compile(ASTSource(kernel, signature, constants), target=TARGET, options=launch)


def main() -> None:
    found: dict[str, list[str]] = {}

    def record(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any) -> None:
        name = f"{kernel.fn.__module__}.{kernel.fn.__name__} {sorted((k, str(v)) for k, v in options.items())}"
        if name not in found:
            ptx = compiled(kernel, args, options).asm["ptx"]
            found[name] = sorted(set(FORBIDDEN.findall(ptx)))

    triton.runtime.jit.JITFunction.run = record
    for module in (blockwise, four_bit, fp8, groups, int8, mxfp4):
        module.on = lambda weight: nullcontext()
    calls(torch.bfloat16)
    json.dump(found, sys.stdout)


def calls(dtype: torch.dtype) -> None:
    """One call of each kind."""
    weight = torch.ones(130, 256, dtype=dtype)
    for quant_type in ("nf4", "fp4"):
        codes, absmax = gpu.quantize_4bit(weight[:, :9].reshape(-1), 64, quant_type)
        gpu.encode_4bit(weight[:, :9].reshape(-1), absmax, 64, quant_type)
    gpu.dequantize_4bit(codes, absmax, 64, "nf4", (130, 9), dtype)
    gpu.encode_int8_rows(weight, gpu.quantize_int8_rows(weight)[1])
    gpu.quantize_int8_rows(torch.ones(1, 9000, dtype=dtype))
    for block in ((None, None), (1, None), (128, 128)):
        gpu.dequantize_fp8(*gpu.quantize_fp8(weight, block), block, dtype)
    for symmetric in (True, False):
        gpu.dequantize_groups(*gpu.quantize_groups(weight, 128, 4, symmetric), 128, dtype)
    gpu.dequantize_mxfp4(*gpu.quantize_mxfp4(weight), dtype)
    gpu.quantize_blockwise(weight, torch.linspace(-1, 1, 256), 256)


if __name__ == "__main__":
    main()
