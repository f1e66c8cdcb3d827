"""Native kernels for the CPU: the functions of `reference`, bit-equal to them and many times faster.

The numbers are the reference's own; only the payload of a NaN may differ. The library (`native/`) is plain C++ without
any dependency, in variants for AVX-512, AVX2 and any other processor. `isa()` returns the one that runs here, and the
environment variable `DISTQUANT_CPU_ISA` (`portable`, `avx2`, `avx512`) forces one.

All tensors are on the CPU. Weights may be bfloat16, float16 or float32; weights that are not contiguous are copied.
Outputs (`codes=`, `absmax=`, `scale=`, `zero=`) must be contiguous and are written in place. Work is shared among
`torch.get_num_threads()` threads at block or row boundaries, which changes no result; the interpreter's lock is
released meanwhile. Other functions that only reduce or look up are the reference's own. Invalid arguments raise
ValueError.

Raises:
    ImportError: the library was not built.
"""

from distquant.kernels.cpu.fp8 import (
    block_amax,
    dequantize_fp8,
    encode_fp8,
    quantize_fp8,
    quantize_fp8_rows,
    quantize_fp8_ue8m0,
)
from distquant.kernels.cpu.library import ISAS, isa
from distquant.kernels.cpu.matrices import (
    dequantize_groups,
    dequantize_mxfp4,
    encode_int8_rows,
    encode_scaled_rows,
    quantize_groups,
    quantize_int8_rows,
    quantize_mxfp4,
)
from distquant.kernels.cpu.runs import (
    dequantize_4bit,
    dequantize_blockwise,
    encode_4bit,
    quantize_4bit,
    quantize_blockwise,
)
from distquant.kernels.reference import (
    block_absmax,
    blockwise_absmax,
    code_values,
    row_absmax,
    unpack_4bit,
)

__all__ = [
    "ISAS",
    "block_absmax",
    "block_amax",
    "blockwise_absmax",
    "code_values",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp8",
    "dequantize_groups",
    "dequantize_mxfp4",
    "encode_4bit",
    "encode_fp8",
    "encode_int8_rows",
    "encode_scaled_rows",
    "isa",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp8",
    "quantize_fp8_rows",
    "quantize_fp8_ue8m0",
    "quantize_groups",
    "quantize_int8_rows",
    "quantize_mxfp4",
    "row_absmax",
    "unpack_4bit",
]
