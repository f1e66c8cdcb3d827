// Second level of double quantization: float32 to 8-bit codes of a table of 256 values.
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

typedef double Doubles __attribute__((vector_size(W * 8)));

// The grid point of [-1, 1] nearest to `x` in each lane, 0 for NaN. bitsandbytes computes it with a fused multiply and
// add. The product has 40 bits, so in double the sum's rounding to float is the only one, with or without such an
// instruction.
DISTQUANT_INLINE Words grid_points(Floats x) {
    const Floats one = all(1.0f);
    Floats inside = select((Signed)(x < -one), -one, x);
    inside = select((Signed)(inside > one), one, inside);
    const Doubles half = __builtin_convertvector((inside + one) * 0.5f, Doubles);
    const Floats point = __builtin_convertvector(half * 65535.0 + 0.5, Floats);
    const Signed number = (Signed)(x == x);
    return (Words)__builtin_convertvector(select(number, point, Floats{}), Signed);
}

// Largest magnitude; NaN is ignored.
DISTQUANT_INLINE float absmax_of_numbers(const float *from, int64_t count) {
    Floats best{};
    by_lanes(count, [&](int64_t i, int lanes) {
        const Floats magnitude = (Floats)((Words)read<F32>((const uint8_t *)(from + i), lanes) & 0x7fffffffu);
        best = select((Signed)(magnitude > best), magnitude, best);
    });
    return highest_of(best);
}

}  // namespace

void quantize_blockwise(const QuantizeBlockwise &a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * a.blocksize, left = a.count - start;
        const int64_t count = left < a.blocksize ? left : a.blocksize;
        const float *from = a.source + start;
        uint8_t *to = a.codes + start;
        const float absmax = absmax_of_numbers(from, count);
        a.absmax[block] = absmax;
        const Floats inverse = all(1.0f / absmax);
        by_lanes(count, [&](int64_t i, int lanes) {
            uint32_t points[W];
            store(points, grid_points(read<F32>((const uint8_t *)(from + i), lanes) * inverse));
            for (int lane = 0; lane < lanes; ++lane) to[i + lane] = a.nearest[points[lane]];
        });
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
