// float8 e4m3 (no infinities, one NaN) under one scale a tile.
#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

constexpr float kLargest = 448.0f;
constexpr uint32_t kNan = 0x7f;

// What a tile's elements are multiplied by. An infinite amax gives 0 and so an infinite scale.
inline float factor_of(float amax) {
    const float factor = 1.0f / amax * kLargest;  // two roundings, as the reference has them
    return amax > 0.0f && factor < __builtin_inff() ? factor : 1.0f;
}

// float32 -> e4m3 in the low byte, clamped, to nearest even.
DISTQUANT_INLINE Words to_e4m3(Floats x) {
    const Words magnitude = (Words)x & 0x7fffffffu;
    const Words largest = all_bits(0x43e00000);  // 448
    const Words u = select((Signed)(magnitude > largest), largest, magnitude);
    const Words normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3);
    const Words denormal = (Words)((Floats)u + 0x1p14f) - 0x46800000u;  // the sum rounds at 2^-9, the smallest e4m3
    const Words code = select((Signed)(u < 0x3c800000u), denormal, normal) | (((Words)x >> 24) & 0x80u);
    return select((Signed)(magnitude > 0x7f800000u), all_bits(kNan), code);
}

DISTQUANT_INLINE Floats from_e4m3(Words code) {
    const Words magnitude = code & 0x7fu;
    const Words value = (Words)((Floats)(magnitude << 20) * 0x1p120f);  // moves the exponent's bias, denormals too
    return (Floats)(select((Signed)(magnitude == kNan), all_bits(0x7fc00000), value) | ((code & 0x80u) << 24));
}

template <class T>
DISTQUANT_INLINE void encode_run(const uint8_t *from, int64_t count, float by, uint8_t *to) {
    const Floats factor = all(by);
    by_lanes(count, [=](int64_t at, int lanes) {
        write_bytes(to + at, to_e4m3(read<T>(from + at * T::bytes, lanes) * factor), lanes);
    });
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// As integers magnitudes keep their order and NaN is above all.
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
            const float factor = factor_of(amax);
            a.scale[band * across + tile] = 1.0f / factor;
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
