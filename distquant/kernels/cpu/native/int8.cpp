// LLM.int8: one absmax a row, after the cast to float16 that the method makes.
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

constexpr float kLargestHalf = 65504.0f;

// True if the cast to float16 changes no code of a row, so that it can be left out: bfloat16 of 2^-17 and more keeps
// all its bits, and anything smaller becomes 0 under an absmax of 2^-8 and more. Then no element is NaN either.
template <class T>
DISTQUANT_INLINE bool half_is_exact(float largest, float absmax) {
    return T::bytes == 2 && largest <= kLargestHalf && absmax >= 0x1p-8f;
}

template <class T>
DISTQUANT_INLINE void encode_exact(const uint8_t *from, int64_t count, Floats factor, uint8_t *to) {
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        const Pair x = T::read_pairs(from + i * T::bytes);
        store_low_bytes(to + i, (Words)(x.even * factor + kRounder), (Words)(x.odd * factor + kRounder));
    }
    by_lanes(count - i, [=](int64_t at, int lanes) {
        const Floats x = read<T>(from + (i + at) * T::bytes, lanes);
        write_bytes(to + i + at, (Words)(x * factor + kRounder), lanes);
    });
}

template <class T>
void quantize(const QuantizeInt8Rows &a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const uint8_t *from = (const uint8_t *)a.weight + row * a.columns * T::bytes;
        uint8_t *to = (uint8_t *)a.codes + row * a.columns;
        // Rounding keeps the order, so the largest of the rounded is the rounded largest.
        const float largest = through_half(all(absmax_of<T>(from, a.columns)))[0];
        if (a.statistics == kComputed) a.absmax[row] = largest;
        const Floats factor = all(1.0f / a.absmax[row] * 127.0f);  // two roundings, as the reference has them
        if (half_is_exact<T>(largest, a.absmax[row])) {
            encode_exact<T>(from, a.columns, factor, to);
            continue;
        }
        by_lanes(a.columns, [=](int64_t at, int lanes) {
            const Floats scaled = through_half(read<T>(from + at * T::bytes, lanes)) * factor;
            const Words valid = (Words)(scaled == scaled);  // NaN becomes 0
            write_bytes(to + at, (Words)(scaled + kRounder) & valid, lanes);
        });
    }
}

}  // namespace

void quantize_int8_rows(const QuantizeInt8Rows &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) quantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
