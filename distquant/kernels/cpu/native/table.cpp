// The table of one instruction set. Compiled once per set, as the kernels are.
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    quantize_4bit,  dequantize_4bit,  quantize_blockwise, dequantize_blockwise, quantize_int8_rows,
    quantize_fp8,   amax_fp8,         factors_fp8,        encode_fp8,           dequantize_fp8,
    encode_scaled_rows, quantize_groups, dequantize_groups, quantize_mxfp4,     dequantize_mxfp4,
};

}  // namespace DISTQUANT_ISA
}  // namespace distquant
