// Rows under scales that the caller chose: int8 within bounds, or float8 e4m3.
#include "e4m3.hpp"
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

template <class T, bool inverse, bool rounded>
void encode(const EncodeScaledRows &a, int64_t first, int64_t last) {
    const Floats low = all(a.low), high = all(a.high);
    for (int64_t row = first; row < last; ++row) {
        const uint8_t *from = (const uint8_t *)a.weight + row * a.columns * T::bytes;
        uint8_t *to = a.codes + row * a.columns;
        const float scale = a.scale[row];
        if (scale == 0.0f) {
            std::memset(to, 0, (size_t)a.columns);
            continue;
        }
        const Floats by = all(inverse ? 1.0f / scale : scale);
        const auto scaled = [=](int64_t at, int lanes) {
            const Floats x = read<T>(from + at * T::bytes, lanes);
            const Floats value = inverse ? x * by : x / by;
            return rounded ? T::rounded(value) : value;
        };
        if (a.type_of_codes == kE4m3) {
            by_lanes(a.columns, [=](int64_t at, int lanes) { write_bytes(to + at, to_e4m3(scaled(at, lanes)), lanes); });
            continue;
        }
        by_lanes(a.columns, [=](int64_t at, int lanes) {
            const Floats x = scaled(at, lanes);
            const Floats inside = select((Signed)(x < low), low, select((Signed)(x > high), high, x));
            const Words valid = (Words)(x == x);  // NaN becomes 0
            write_bytes(to + at, (Words)(inside + kRounder) & valid, lanes);
        });
    }
}

}  // namespace

void encode_scaled_rows(const EncodeScaledRows &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T)                                                \
    a.inverse ? a.rounded ? encode<T, true, true>(a, first, last)        \
                          : encode<T, true, false>(a, first, last)       \
              : a.rounded ? encode<T, false, true>(a, first, last)       \
                          : encode<T, false, false>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
