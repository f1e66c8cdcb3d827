// MXFP4: e2m1 codes under a power of two for each 32 elements, the even one in the low nibble.
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7f800000u, kFraction = 0x7fffffu;
constexpr uint32_t kNotFinite = 255;  // the scale that is NaN

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The byte of the smallest power of two that is not less than a sixth of the amax.
inline uint32_t scale_of(float amax) {
    if (bits_of(amax) >= kInfinity) return kNotFinite;
    return (bits_of(amax / 6.0f) + kFraction) >> 23;  // a fraction that is not 0 carries into the exponent
}

// Codes of magnitudes up to 6, with steps of 0.5 below 2, 1 below 4, and 2. Adding `kRounder` and the code at which the
// steps begin leaves the code in the low bits of the sum.
DISTQUANT_INLINE Words to_e2m1(Floats x) {
    const Floats size = (Floats)((Words)x & 0x7fffffffu);
    const Signed below_two = size < 2.0f, below_four = size < 4.0f;
    const Floats per = select(below_two, all(2.0f), select(below_four, all(1.0f), all(0.5f)));
    const Floats from = select(below_two, all(kRounder), select(below_four, all(kRounder + 2.0f), all(kRounder + 4.0f)));
    return ((Words)(size * per + from) & 7u) | (((Words)x >> 28) & 8u);
}

template <class T>
void quantize(const QuantizeMxfp4 &a, int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
        const uint8_t *from = (const uint8_t *)a.weight + run * kRun * T::bytes;
        uint8_t *to = a.codes + run * (kRun / 2);
        const uint32_t scale = scale_of(absmax_of<T>(from, kRun));
        a.scale[run] = (uint8_t)scale;
        if (scale == kNotFinite) {
            std::memset(to, 0x77, kRun / 2);
            continue;
        }
        const Floats inverse = all(as_float((254u - scale) << 23));
        for (int64_t i = 0; i < kRun; i += 2 * W) {
            const Pair x = T::read_pairs(from + i * T::bytes);
            store_low_bytes(to + i / 2, to_e2m1(x.even * inverse) | (to_e2m1(x.odd * inverse) << 4));
        }
    }
}

template <class T>
void dequantize(const DequantizeMxfp4 &a, int64_t first, int64_t last) {
    constexpr float values[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
    for (int64_t run = first; run < last; ++run) {
        // A run has only sixteen different results: they are computed and rounded first, then looked up.
        const uint32_t byte = a.scale[run];
        const uint32_t normal = byte ? byte << 23 : 1u << 22;  // 2^-127 is subnormal
        const Floats scale = all(as_float(byte == kNotFinite ? 0x7fc00000u : normal));
        Lookup table;
        for (int i = 0; i < 16 / W; ++i) table.part[i] = T::encode(load<Floats>(values + i * W) * scale);
        const uint8_t *from = a.codes + run * (kRun / 2);
        uint8_t *to = (uint8_t *)a.out + run * kRun * T::bytes;
        for (int64_t i = 0; i < kRun; i += 2 * W) {
            const Words code = __builtin_convertvector(load<Bytes>(from + i / 2), Words);
            T::write_pairs(to + i * T::bytes, look_up(table, code), look_up(table, code >> 4));
        }
    }
}

}  // namespace

void quantize_mxfp4(const QuantizeMxfp4 &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) quantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

void dequantize_mxfp4(const DequantizeMxfp4 &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) dequantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
