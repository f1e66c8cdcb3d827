"""Triton kernels: the reference's functions for tensors on a GPU, one read of the weight and one write of the codes.

Bit-equal to `distquant.kernels.reference`, whose docstrings hold the definitions. Four rules keep them so. Divisions
are `div_rn` (`/` may be approximate). Launches forbid the fusion of a product and a sum into one rounding. Maxima are
taken over the bits of magnitudes, which order like the floats and keep a NaN. Roundings to e4m3 and bfloat16 are
integer arithmetic. The same source runs in Triton's interpreter on a CPU (`TRITON_INTERPRET=1`), for its tests.

Functions that only look up or reduce are the reference's own: plain torch runs them on the device. This is the only
package that imports Triton.
"""

from distquant.kernels.gpu.blockwise import quantize_blockwise
from distquant.kernels.gpu.four_bit import dequantize_4bit, encode_4bit, quantize_4bit
from distquant.kernels.gpu.fp8 import (
    dequantize_fp8,
    encode_fp8,
    quantize_fp8,
    quantize_fp8_rows,
    quantize_fp8_ue8m0,
)
from distquant.kernels.gpu.groups import dequantize_groups, quantize_groups
from distquant.kernels.gpu.int8 import encode_int8_rows, quantize_int8_rows
from distquant.kernels.gpu.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from distquant.kernels.gpu.scaled_rows import encode_scaled_rows
from distquant.kernels.reference import (
    block_absmax,
    block_amax,
    blockwise_absmax,
    blockwise_table,
    code_values,
    dequantize_blockwise,
    fp8_factors,
    row_absmax,
    unpack_4bit,
)

__all__ = [
    "block_absmax",
    "block_amax",
    "blockwise_absmax",
    "blockwise_table",
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
    "fp8_factors",
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
