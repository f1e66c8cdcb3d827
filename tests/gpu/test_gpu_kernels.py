"""Triton kernels on a GPU against the reference on the CPU, bit for bit; skipped, visibly, where there is none."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import cases, same
from kernel_samples import DTYPES, random

from distquant.kernels import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CASES = cases()


@pytest.mark.parametrize("name", list(CASES))
def test_a_kernel_on_the_gpu_is_the_reference(name: str) -> None:
    from distquant.kernels import gpu

    CASES[name](gpu, "cuda")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(4096, 4096), (1001, 11008)])
def test_large_weights(shape: tuple[int, int], dtype: str) -> None:
    from distquant.kernels import gpu

    weight = random(shape[0] * shape[1], DTYPES[dtype], 1, 0.02).view(shape)
    there = weight.cuda()
    for quant_type in ("nf4", "fp4"):
        codes, absmax = gpu.quantize_4bit(there, 64, quant_type)
        same((codes, absmax), reference.quantize_4bit(weight, 64, quant_type), quant_type)
        found = gpu.dequantize_4bit(codes, absmax, 64, quant_type, shape, DTYPES[dtype])
        expected = reference.dequantize_4bit(codes.cpu(), absmax.cpu(), 64, quant_type, shape, DTYPES[dtype])
        same(found, expected, f"{quant_type} back")
    same(gpu.quantize_int8_rows(there), reference.quantize_int8_rows(weight), "int8")
    for block in ((None, None), (1, None), (128, 128)):
        same(gpu.quantize_fp8(there, block), reference.quantize_fp8(weight, block), f"fp8 {block}")
    same(gpu.quantize_mxfp4(there), reference.quantize_mxfp4(weight), "mxfp4")
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        found = gpu.quantize_groups(there, 128, bits, symmetric)
        same(found, reference.quantize_groups(weight, 128, bits, symmetric), f"groups {bits} {symmetric}")


def test_the_reference_itself_gives_the_same_bits_on_the_gpu() -> None:
    weight = random(300 * 500, torch.bfloat16, 2).view(300, 500)
    there = weight.cuda()
    code = torch.linspace(-1, 1, 256)
    same(reference.quantize_4bit(there, 64, "nf4"), reference.quantize_4bit(weight, 64, "nf4"))
    same(reference.quantize_int8_rows(there), reference.quantize_int8_rows(weight))
    same(reference.quantize_fp8(there, (128, 128)), reference.quantize_fp8(weight, (128, 128)))
    same(reference.quantize_groups(there, 128, 4, False), reference.quantize_groups(weight, 128, 4, False))
    same(reference.quantize_mxfp4(there[:, :480]), reference.quantize_mxfp4(weight[:, :480]))
    same(reference.quantize_blockwise(there, code.cuda(), 256), reference.quantize_blockwise(weight, code, 256))
