// float8 e4m3 (no infinities, one NaN) under one scale a tile.
#include "e4m3.hpp"
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

constexpr float kLargest = 448.0f;

// The factor of a tile's elements. An infinite amax gives 0 and so an infinite scale.
inline float factor_of(float amax) {
    const float factor = 1.0f / amax * kLargest;  // two roundings, as the reference has them
    return amax > 0.0f && factor < __builtin_inff() ? factor : 1.0f;
}

// Exponent of the power of two that a tile of that amax is divided by, as ue8m0 has it; an infinite amax gives NaN.
inline uint8_t power_of(float amax) {
    const float factor = amax > 0.0f ? 1.0f / amax * kLargest : 1.0f;
    const float exact = 1.0f / factor, scale = exact < 0x1p-126f ? 0x1p-126f : exact;
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof bits);
    return (uint8_t)((bits + 0x7fffffu) >> 23);  // a fraction that is not 0 carries into the exponent
}

// The factor that replaces a division: exact.
inline float reciprocal_of(uint8_t power) {
    return power == 0xff ? __builtin_nanf("") : 1.0f / as_float((uint32_t)power << 23);
}

template <class T>
DISTQUANT_INLINE void encode_run(const uint8_t *from, int64_t count, float by, uint8_t *to) {
    const Floats factor = all(by);
    by_lanes(count, [=](int64_t at, int lanes) {
        write_bytes(to + at, to_e4m3(read<T>(from + at * T::bytes, lanes) * factor), lanes);
    });
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// As integers, magnitudes keep their order, and NaN is above all.
inline float larger_magnitude(float a, float b) {
    uint32_t x, y;
    std::memcpy(&x, &a, 4);
    std::memcpy(&y, &b, 4);
    return x > y ? a : b;
}

template <class T>
void quantize(const QuantizeFp8 &a, int64_t first, int64_t last) {
    const Tiles &t = a.tiles;
    const int64_t across = t.across();
    for (int64_t band = first; band < last; ++band) {
        const int64_t top = band * t.tile_rows, bottom = least(top + t.tile_rows, t.rows);
        for (int64_t tile = 0; tile < across; ++tile) {
            const int64_t left = tile * t.tile_columns, width = least(t.tile_columns, t.columns - left);
            float amax = 0.0f;
            for (int64_t row = top; row < bottom; ++row) {
                const uint8_t *from = (const uint8_t *)a.weight + (row * t.columns + left) * T::bytes;
                amax = larger_magnitude(absmax_of<T>(from, width), amax);
            }
            float factor;
            if (a.powers) {
                const uint8_t power = power_of(amax);
                a.powers[band * across + tile] = power;
                factor = reciprocal_of(power);
            } else {
                factor = factor_of(amax);
                a.scale[band * across + tile] = 1.0f / factor;
            }
            for (int64_t row = top; row < bottom; ++row) {
                const int64_t at = row * t.columns + left;
                encode_run<T>((const uint8_t *)a.weight + at * T::bytes, width, factor, a.codes + at);
            }
        }
    }
}

template <class T>
void amax_of_rows(const QuantizeFp8 &a, int64_t first, int64_t last) {
    const Tiles &t = a.tiles;
    const int64_t across = t.across();
    for (int64_t row = first; row < last; ++row)
        for (int64_t tile = 0; tile < across; ++tile) {
            const int64_t left = tile * t.tile_columns, width = least(t.tile_columns, t.columns - left);
            const uint8_t *from = (const uint8_t *)a.weight + (row * t.columns + left) * T::bytes;
            a.amax[row * across + tile] = absmax_of<T>(from, width);
        }
}

template <class T>
void encode_rows(const QuantizeFp8 &a, int64_t first, int64_t last) {
    const Tiles &t = a.tiles;
    const int64_t across = t.across();
    for (int64_t row = first; row < last; ++row)
        for (int64_t tile = 0; tile < across; ++tile) {
            const int64_t left = tile * t.tile_columns, width = least(t.tile_columns, t.columns - left);
            const int64_t at = row * t.columns + left;
            const float factor = a.factors[row / t.tile_rows * across + tile];
            encode_run<T>((const uint8_t *)a.weight + at * T::bytes, width, factor, a.codes + at);
        }
}

template <class T>
void dequantize(const DequantizeFp8 &a, int64_t first, int64_t last) {
    const Tiles &t = a.tiles;
    const int64_t across = t.across();
    for (int64_t row = first; row < last; ++row)
        for (int64_t tile = 0; tile < across; ++tile) {
            const int64_t left = tile * t.tile_columns, width = least(t.tile_columns, t.columns - left);
            const int64_t start = row * t.columns + left;
            const uint8_t *from = a.codes + start;
            uint8_t *to = (uint8_t *)a.out + start * T::bytes;
            const Floats scale = all(a.scale[row / t.tile_rows * across + tile]);
            by_lanes(width, [=](int64_t at, int lanes) {
                write<T>(to + at * T::bytes, from_e4m3(read_bytes(from + at, lanes)) * scale, lanes);
            });
        }
}

}  // namespace

void quantize_fp8(const QuantizeFp8 &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) quantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

void amax_fp8(const QuantizeFp8 &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) amax_of_rows<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

void factors_fp8(const QuantizeFp8 &a, int64_t first, int64_t last) {
    for (int64_t tile = first; tile < last; ++tile) {
        a.factors[tile] = factor_of(a.factors[tile]);
        a.scale[tile] = 1.0f / a.factors[tile];
    }
}

void encode_fp8(const QuantizeFp8 &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) encode_rows<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

void dequantize_fp8(const DequantizeFp8 &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) dequantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
