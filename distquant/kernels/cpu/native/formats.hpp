// The three float formats of weights: reading and writing a vector of each, and finding its largest magnitude.
#pragma once

#include "kernels.hpp"
#include "lanes.hpp"

namespace distquant {
namespace DISTQUANT_ISA {

struct F32 {
    static constexpr int64_t bytes = 4;
    DISTQUANT_INLINE Floats read(const uint8_t *from) { return load<Floats>(from); }
    DISTQUANT_INLINE Pair read_pairs(const uint8_t *from) {
        return deinterleave(load<Floats>(from), load<Floats>(from + sizeof(Floats)));
    }
    DISTQUANT_INLINE void write(uint8_t *to, Floats x) { store(to, x); }
    // To the precision of the format and back.
    DISTQUANT_INLINE Floats rounded(Floats x) { return x; }
    static constexpr float epsilon = 0x1p-23f;
    // The part of a float32 that `write_pairs` takes.
    DISTQUANT_INLINE Words encode(Floats x) { return (Words)x; }
    DISTQUANT_INLINE void write_pairs(uint8_t *to, Words even, Words odd) { store_interleaved(to, even, odd); }
    typedef Signed Magnitudes;
    DISTQUANT_INLINE Magnitudes magnitudes(const uint8_t *from) { return load<Signed>(from) & 0x7fffffff; }
    DISTQUANT_INLINE float widen(uint32_t bits) { return as_float(bits); }
};

struct F16 {
    static constexpr int64_t bytes = 2;
    DISTQUANT_INLINE Floats read(const uint8_t *from) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
        return from_half(__builtin_convertvector(load<Halves>(from), Words));
#endif
    }
    DISTQUANT_INLINE Pair read_pairs(const uint8_t *from) {
        const Words two = load<Words>(from);
        return {from_half(two & 0xffffu), from_half(two >> 16)};
    }
    DISTQUANT_INLINE void write(uint8_t *to, Floats x) { store(to, __builtin_convertvector(to_half(x), Halves)); }
    DISTQUANT_INLINE Floats rounded(Floats x) { return through_half(x); }
    static constexpr float epsilon = 0x1p-10f;
    DISTQUANT_INLINE Words encode(Floats x) { return to_half(x); }
    DISTQUANT_INLINE void write_pairs(uint8_t *to, Words even, Words odd) { store(to, even | (odd << 16)); }
    typedef Shorts Magnitudes;
    DISTQUANT_INLINE Magnitudes magnitudes(const uint8_t *from) { return load<Shorts>(from) & (int16_t)0x7fff; }
    DISTQUANT_INLINE float widen(uint32_t bits) { return from_half(all_bits(bits))[0]; }
};

struct BF16 {
    static constexpr int64_t bytes = 2;
    DISTQUANT_INLINE Floats read(const uint8_t *from) {
        return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
    }
    DISTQUANT_INLINE Pair read_pairs(const uint8_t *from) {
        const Words two = load<Words>(from);
        return {(Floats)(two << 16), (Floats)(two & 0xffff0000u)};
    }
    DISTQUANT_INLINE void write(uint8_t *to, Floats x) {
        store(to, __builtin_convertvector(to_bfloat_high(x) >> 16, Halves));
    }
    DISTQUANT_INLINE Floats rounded(Floats x) { return (Floats)(to_bfloat_high(x) & 0xffff0000u); }
    static constexpr float epsilon = 0x1p-7f;
    DISTQUANT_INLINE Words encode(Floats x) { return to_bfloat_high(x) >> 16; }
    DISTQUANT_INLINE void write_pairs(uint8_t *to, Words even, Words odd) { store(to, even | (odd << 16)); }
    typedef Shorts Magnitudes;
    DISTQUANT_INLINE Magnitudes magnitudes(const uint8_t *from) { return load<Shorts>(from) & (int16_t)0x7fff; }
    DISTQUANT_INLINE float widen(uint32_t bits) { return as_float(bits << 16); }
};

// Largest magnitude of `count` elements. Magnitudes are compared as integers, which orders them as floats do and puts
// NaN above infinity: one NaN makes the result NaN.
template <class T>
DISTQUANT_INLINE float absmax_of(const uint8_t *from, int64_t count) {
    typedef typename T::Magnitudes Magnitudes;
    constexpr int64_t step = (int64_t)sizeof(Magnitudes) / T::bytes;
    Magnitudes best{};
    int64_t i = 0;
    for (; i + step <= count; i += step) best = larger(best, T::magnitudes(from + i * T::bytes));
    if (i < count) {
        uint8_t rest[sizeof(Magnitudes)] = {};
        std::memcpy(rest, from + i * T::bytes, (size_t)((count - i) * T::bytes));
        best = larger(best, T::magnitudes(rest));
    }
    return T::widen(largest_of(best));
}

// Calls `step(at, lanes)` for each W elements of `count` and once for the rest: `lanes` elements from `at`.
template <class Step>
DISTQUANT_INLINE void by_lanes(int64_t count, Step step) {
    int64_t i = 0;
    for (; i + W <= count; i += W) step(i, W);
    if (i < count) step(i, (int)(count - i));
}

// The same as `T::read` and the like, for the last `lanes` elements of a row; the lanes beyond are zeros.
template <class T>
DISTQUANT_INLINE Floats read(const uint8_t *from, int lanes) {
    if (lanes == W) return T::read(from);
    uint8_t rest[W * T::bytes] = {};
    std::memcpy(rest, from, (size_t)(lanes * T::bytes));
    return T::read(rest);
}

template <class T>
DISTQUANT_INLINE void write(uint8_t *to, Floats x, int lanes) {
    if (lanes == W) return T::write(to, x);
    uint8_t rest[W * T::bytes];
    T::write(rest, x);
    std::memcpy(to, rest, (size_t)(lanes * T::bytes));
}

DISTQUANT_INLINE Words read_bytes(const uint8_t *from, int lanes) {
    if (lanes == W) return __builtin_convertvector(load<Bytes>(from), Words);
    uint8_t rest[W] = {};
    std::memcpy(rest, from, (size_t)lanes);
    return __builtin_convertvector(load<Bytes>(rest), Words);
}

DISTQUANT_INLINE void write_bytes(uint8_t *to, Words x, int lanes) {
    if (lanes == W) return store_low_bytes(to, x);
    uint8_t rest[W];
    store_low_bytes(rest, x);
    std::memcpy(to, rest, (size_t)lanes);
}

// Calls `work` with the format that `type` names.
#define DISTQUANT_BY_FORMAT(type, work)          \
    switch (type) {                              \
        case kFloat32: work(F32); break;         \
        case kFloat16: work(F16); break;         \
        case kBFloat16: work(BF16); break;       \
    }

}  // namespace DISTQUANT_ISA
}  // namespace distquant
