// The declarations of one instruction set's kernels; `table.cpp` lists them.
#pragma once

#include "kernels.hpp"

namespace distquant {
namespace DISTQUANT_ISA {

void quantize_4bit(const Quantize4bit &, int64_t first, int64_t last);
void dequantize_4bit(const Dequantize4bit &, int64_t first, int64_t last);
void quantize_blockwise(const QuantizeBlockwise &, int64_t first, int64_t last);
void dequantize_blockwise(const DequantizeBlockwise &, int64_t first, int64_t last);
void quantize_int8_rows(const QuantizeInt8Rows &, int64_t first, int64_t last);
void quantize_fp8(const QuantizeFp8 &, int64_t first, int64_t last);
void amax_fp8(const QuantizeFp8 &, int64_t first, int64_t last);
void factors_fp8(const QuantizeFp8 &, int64_t first, int64_t last);
void encode_fp8(const QuantizeFp8 &, int64_t first, int64_t last);
void dequantize_fp8(const DequantizeFp8 &, int64_t first, int64_t last);
void encode_scaled_rows(const EncodeScaledRows &, int64_t first, int64_t last);
void quantize_groups(const QuantizeGroups &, int64_t first, int64_t last);
void dequantize_groups(const DequantizeGroups &, int64_t first, int64_t last);
void quantize_mxfp4(const QuantizeMxfp4 &, int64_t first, int64_t last);
void dequantize_mxfp4(const DequantizeMxfp4 &, int64_t first, int64_t last);

}  // namespace DISTQUANT_ISA
}  // namespace distquant
