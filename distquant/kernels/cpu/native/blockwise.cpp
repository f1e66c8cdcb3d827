// Second level of double quantization: float32 to 8-bit codes of a table of 256 values. A sixty-fourth of the weights
// passes here, so plain loops do.
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

// The grid point of [-1, 1] nearest to `x`, 0 for NaN. bitsandbytes computes it with a fused multiply and add; the
// product has 40 bits, so in double the sum's rounding to float is the only one, with or without such an instruction.
inline uint32_t grid_point(float x) {
    if (!(x == x)) return 0;
    const float inside = x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x;
    const float half = (inside + 1.0f) * 0.5f;
    return (uint32_t)(float)((double)half * 65535.0 + 0.5);
}

}  // namespace

void quantize_blockwise(const QuantizeBlockwise &a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * a.blocksize;
        const int64_t end = start + a.blocksize < a.count ? start + a.blocksize : a.count;
        float absmax = 0.0f;
        for (int64_t i = start; i < end; ++i) {
            const float magnitude = __builtin_fabsf(a.source[i]);
            absmax = magnitude > absmax ? magnitude : absmax;  // passes over NaN
        }
        a.absmax[block] = absmax;
        const float inverse = 1.0f / absmax;
        for (int64_t i = start; i < end; ++i) a.codes[i] = a.nearest[grid_point(a.source[i] * inverse)];
    }
}

void dequantize_blockwise(const DequantizeBlockwise &a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * a.blocksize;
        const int64_t end = start + a.blocksize < a.count ? start + a.blocksize : a.count;
        const float absmax = a.absmax[block];
        for (int64_t i = start; i < end; ++i) a.out[i] = a.values[a.codes[i]] * absmax;
    }
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
