// LLM.int8: one absmax a row, after the cast to float16 that the method makes.
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

template <class T>
void quantize(const QuantizeInt8Rows &a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
        const uint8_t *from = (const uint8_t *)a.weight + row * a.columns * T::bytes;
        uint8_t *to = (uint8_t *)a.codes + row * a.columns;
        // Rounding keeps the order, so the largest of the rounded is the rounded largest.
        if (a.statistics == kFound) a.absmax[row] = through_half(all(absmax_of<T>(from, a.columns)))[0];
        const Floats factor = all(1.0f / a.absmax[row] * 127.0f);  // two roundings, as the reference has them
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
