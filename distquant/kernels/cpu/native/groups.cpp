// Integers of 4 or 8 bits with a scale, and perhaps a zero point, per group of a row's columns. As in the reference
// every operation is rounded to the weight's own format.
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

struct Group {
    float scale, zero;
};

// clamp(x, -top, top - 1), rounded half to even, NaN as 0.
DISTQUANT_INLINE Floats to_integer(Floats x, float top) {
    const Floats low = all(-top), high = all(top - 1.0f);
    const Floats inside = select((Signed)(x < low), low, select((Signed)(x > high), high, x));
    const Floats whole = (inside + kRounder) - kRounder;
    return (Floats)((Words)whole & (Words)(x == x));
}

struct Range {
    float low, high;
};

// Smallest and largest element, zero counted in; NaN both where there is one.
template <class T>
DISTQUANT_INLINE Range range_of(const uint8_t *from, int64_t count) {
    Floats low = all(0.0f), high = low;
    Signed valid = ~Signed{};
    by_lanes(count, [&](int64_t at, int lanes) {
        const Floats x = read<T>(from + at * T::bytes, lanes);
        low = select((Signed)(x < low), x, low);
        high = select((Signed)(x > high), x, high);
        valid &= (Signed)(x == x);
    });
    if (!all_of(valid)) return {__builtin_nanf(""), __builtin_nanf("")};
    return {-highest_of(-low), highest_of(high)};
}

template <class T>
DISTQUANT_INLINE float rounded(float x) {
    return T::rounded(all(x))[0];
}

template <class T>
DISTQUANT_INLINE Group parameters(Range range, float top, bool symmetric) {
    Group found = {0.0f, 0.0f};
    if (symmetric) {
        const float largest = -range.low > range.high ? -range.low : range.high;
        found.scale = rounded<T>(largest / (top - 0.5f));
    } else {
        found.scale = rounded<T>(rounded<T>(range.high - range.low) / (2.0f * top - 1.0f));
        // With the scale before a zero is replaced: for such a scale this is NaN or infinite.
        found.zero = to_integer(all(rounded<T>(-top - rounded<T>(range.low / found.scale))), top)[0];
    }
    if (found.scale == 0.0f) found.scale = T::epsilon;
    return found;
}

template <class T, bool symmetric>
void quantize(const QuantizeGroups &a, int64_t first, int64_t last) {
    const int64_t groups = (a.columns + a.group_size - 1) / a.group_size;
    const float top = a.bits == 4 ? 8.0f : 128.0f;
    for (int64_t row = first; row < last; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t left = group * a.group_size, at_left = row * a.columns + left;
            const int64_t count = a.group_size < a.columns - left ? a.group_size : a.columns - left;
            const uint8_t *from = (const uint8_t *)a.weight + at_left * T::bytes;
            uint8_t *to = (uint8_t *)a.codes + at_left;
            const Group found = parameters<T>(range_of<T>(from, count), top, symmetric);
            write<T>((uint8_t *)a.scale + (row * groups + group) * T::bytes, all(found.scale), 1);
            if (!symmetric) a.zero[row * groups + group] = (int8_t)found.zero;
            const Floats scale = all(found.scale), zero = all(found.zero);
            by_lanes(count, [=](int64_t at, int lanes) {
                Floats x = T::rounded(read<T>(from + at * T::bytes, lanes) / scale);
                if (!symmetric) x = T::rounded(x + zero);
                // An integer again, so the sum has it in its low bits.
                write_bytes(to + at, (Words)(to_integer(x, top) + kRounder), lanes);
            });
        }
}

template <class T>
void dequantize(const DequantizeGroups &a, int64_t first, int64_t last) {
    const int64_t groups = (a.columns + a.group_size - 1) / a.group_size;
    for (int64_t row = first; row < last; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t left = group * a.group_size, start = row * a.columns + left;
            const int64_t count = a.group_size < a.columns - left ? a.group_size : a.columns - left;
            const uint8_t *from = (const uint8_t *)a.codes + start;
            uint8_t *to = (uint8_t *)a.out + start * T::bytes;
            const Floats scale = all(a.scale[row * groups + group]);
            const Floats zero = all(a.zero ? (float)a.zero[row * groups + group] : 0.0f);
            by_lanes(count, [=](int64_t at, int lanes) {
                const Signed code = (Signed)(read_bytes(from + at, lanes) << 24) >> 24;
                write<T>(to + at * T::bytes, (__builtin_convertvector(code, Floats) - zero) * scale, lanes);
            });
        }
}

}  // namespace

void quantize_groups(const QuantizeGroups &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) a.zero ? quantize<T, false>(a, first, last) : quantize<T, true>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

void dequantize_groups(const DequantizeGroups &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) dequantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
