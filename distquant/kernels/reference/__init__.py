"""Quantization in plain torch: the truth that every faster kernel must equal bit for bit.

Each file holds one family of formats and says by whose definition. All functions run on any device that torch has, know
nothing of shards, and take outputs that are already there (`codes=`, `absmax=`, `scale=`, `zero=`). Values that are not
finite have defined results, stated with each function; the payload of a NaN is not part of any definition.
Where arithmetic is written here with `reciprocal()` and a product, two roundings are meant, not one division.
"""

from distquant.kernels.reference.blockwise import (
    blockwise_absmax,
    blockwise_table,
    dequantize_blockwise,
    quantize_blockwise,
)
from distquant.kernels.reference.four_bit import (
    FP4,
    FP4_ASCENDING,
    NF4,
    TINY,
    _tables,
    block_absmax,
    code_values,
    dequantize_4bit,
    encode_4bit,
    quantize_4bit,
    unpack_4bit,
)
from distquant.kernels.reference.fp8 import (
    FP8_MAX,
    block_amax,
    dequantize_fp8,
    encode_fp8,
    fbgemm_scales,
    fp8_factors,
    quantize_fp8,
    quantize_fp8_rows,
    quantize_fp8_ue8m0,
    ue8m0_scales,
)
from distquant.kernels.reference.groups import dequantize_groups, quantize_groups
from distquant.kernels.reference.int8 import encode_int8_rows, quantize_int8_rows, row_absmax
from distquant.kernels.reference.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from distquant.kernels.reference.scaled_rows import encode_scaled_rows
from distquant.kernels.reference.tiles import TILE

__all__ = [
    "FP4",
    "FP4_ASCENDING",
    "FP8_MAX",
    "NF4",
    "TILE",
    "TINY",
    "_tables",
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
    "fbgemm_scales",
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
    "ue8m0_scales",
    "unpack_4bit",
]
