// A vector of W floats and the few operations on it that the kernels need, for the instruction set of this unit.
//
// Arithmetic is written with the vector types of GCC and Clang, so one source serves every set. Intrinsics are only used
// where compilers do not choose the instruction themselves. Each set has its own namespace: two units with different
// flags must never share an inline function, or the linker would keep one of the two for both.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define DISTQUANT_INLINE static inline __attribute__((always_inline))

namespace distquant {
namespace DISTQUANT_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef int32_t Signed __attribute__((vector_size(W * 4)));  // of comparisons: 0 or -1 a lane
typedef int16_t Shorts __attribute__((vector_size(W * 4)));  // 2 W lanes
typedef uint16_t Halves __attribute__((vector_size(W * 2)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

template <class V>
DISTQUANT_INLINE V load(const void *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
DISTQUANT_INLINE void store(void *to, V v) {
    std::memcpy(to, &v, sizeof v);
}

DISTQUANT_INLINE Floats all(float x) { return x - Floats{}; }
DISTQUANT_INLINE Words all_bits(uint32_t x) { return x - Words{}; }

DISTQUANT_INLINE Words select(Signed where, Words a, Words b) { return ((Words)where & a) | (~(Words)where & b); }

DISTQUANT_INLINE Floats select(Signed where, Floats a, Floats b) { return (Floats)select(where, (Words)a, (Words)b); }

// Added to |x| < 2^22 it leaves `round(x)`, half to even, in the low bits of the sum.
constexpr float kRounder = 12582912.0f;

DISTQUANT_INLINE float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

DISTQUANT_INLINE void store_low_bytes(void *to, Words v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
#else
    store(to, __builtin_convertvector(v & 255u, Bytes));
#endif
}

// The low bytes of even and odd elements, alternating.
DISTQUANT_INLINE void store_low_bytes(void *to, Words even, Words odd) {
    const Words both = (even & 255u) | ((odd & 255u) << 8);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = (__m256i)both;
    _mm_storeu_si128((__m128i *)to, _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    store(to, __builtin_convertvector(both, Halves));
#endif
}

// float16 in the low half of each word -> float32. Exact.
DISTQUANT_INLINE Floats from_half(Words half) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#else
    const Words magnitude = (half & 0x7fffu) << 13;
    const Words scaled = (Words)((Floats)magnitude * 0x1p112f);  // moves the exponent's bias, denormals too
    const Words special = (Words)(magnitude >= 0x0f800000u) & 0x7f800000u;
    return (Floats)(scaled | special | ((half & 0x8000u) << 16));
#endif
}

// float32 -> float16 in the low half of each word, to nearest even.
DISTQUANT_INLINE Words to_half(Floats x) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return (Words)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const Words u = (Words)x & 0x7fffffffu;
    const Words normal = ((u + 0xfffu + ((u >> 13) & 1u)) >> 13) - (112u << 10);
    const Words denormal = (Words)((Floats)u + 0.5f) - 0x3f000000u;  // the sum rounds at 2^-24, the smallest float16
    Words h = select((Signed)(u < 0x38800000u), denormal, normal);
    h = select((Signed)(u >= 0x47800000u), all_bits(0x7c00), h);
    h = select((Signed)(u > 0x7f800000u), all_bits(0x7e00), h);
    return h | (((Words)x >> 16) & 0x8000u);
#endif
}

// float32 -> bfloat16 in the high half of each word (the low half is undefined), to nearest even.
DISTQUANT_INLINE Words to_bfloat_high(Floats x) {
    const Words u = (Words)x;
    const Words rounded = u + 0x7fffu + ((u >> 16) & 1u);
    return select((Signed)((u & 0x7fffffffu) > 0x7f800000u), all_bits(0x7fc00000), rounded);
}

// float32 rounded to float16 and back.
DISTQUANT_INLINE Floats through_half(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    return from_half(to_half(x));
#endif
}

struct Pair {
    Floats even, odd;
};

DISTQUANT_INLINE Pair deinterleave(Floats a, Floats b) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {(Floats)_mm512_permutex2var_ps((__m512)a, even, (__m512)b),
            (Floats)_mm512_permutex2var_ps((__m512)a, odd, (__m512)b)};
#elif defined(__AVX2__)
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
    return {(Floats)_mm256_permute4x64_pd(even, 0xd8), (Floats)_mm256_permute4x64_pd(odd, 0xd8)};
#else
    return {Floats{a[0], a[2], b[0], b[2]}, Floats{a[1], a[3], b[1], b[3]}};
#endif
}

// Stores even and odd elements, alternating.
DISTQUANT_INLINE void store_interleaved(void *to, Words even, Words odd) {
    uint32_t *out = (uint32_t *)to;
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    store(out, _mm512_permutex2var_epi32((__m512i)even, low, (__m512i)odd));
    store(out + W, _mm512_permutex2var_epi32((__m512i)even, high, (__m512i)odd));
#elif defined(__AVX2__)
    const __m256i low = _mm256_unpacklo_epi32((__m256i)even, (__m256i)odd);
    const __m256i high = _mm256_unpackhi_epi32((__m256i)even, (__m256i)odd);
    store(out, _mm256_permute2x128_si256(low, high, 0x20));
    store(out + W, _mm256_permute2x128_si256(low, high, 0x31));
#else
    store(out, Words{even[0], odd[0], even[1], odd[1]});
    store(out + W, Words{even[2], odd[2], even[3], odd[3]});
#endif
}

// Largest of 2 W magnitudes; none is negative.
DISTQUANT_INLINE Shorts larger(Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Shorts)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
    const Shorts above = a > b;
    return (above & a) | (~above & b);
#endif
}

DISTQUANT_INLINE Signed larger(Signed a, Signed b) {
#if defined(__AVX512F__)
    return (Signed)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Signed)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    const Signed above = a > b;
    return (above & a) | (~above & b);
#endif
}

DISTQUANT_INLINE uint32_t largest_of(Shorts v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m512i whole = (__m512i)v;
    const __m256i half = _mm256_max_epi16(_mm512_castsi512_si256(whole), _mm512_extracti64x4_epi64(whole, 1));
#else
    const __m256i half = (__m256i)v;
#endif
    const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The one horizontal instruction there is finds a minimum, so of the complement.
    const __m128i ones = _mm_set1_epi16(-1);
    return 0xffffu & ~(uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, ones)));
#else
    uint32_t best = 0;
    for (int i = 0; i < 2 * W; ++i) best = (uint32_t)v[i] > best ? (uint32_t)v[i] : best;
    return best;
#endif
}

DISTQUANT_INLINE uint32_t largest_of(Signed v) {
#if defined(__AVX512F__)
    return (uint32_t)_mm512_reduce_max_epi32((__m512i)v);
#else
    uint32_t best = 0;
    for (int i = 0; i < W; ++i) best = (uint32_t)v[i] > best ? (uint32_t)v[i] : best;
    return best;
#endif
}

DISTQUANT_INLINE float highest_of(Floats v) {  // no lane is NaN
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float best = v[0];
    for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

DISTQUANT_INLINE bool all_of(Signed v) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)v) == 0xffff;
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)v) == 0xff;
#else
    bool found = true;
    for (int i = 0; i < W; ++i) found = found && v[i];
    return found;
#endif
}

// Sixteen words, one a code, for lookups by vectors of codes.
struct Lookup {
    Words part[16 / W];
};

DISTQUANT_INLINE Words look_up(const Lookup &table, Words code) {  // of each word the low four bits count
#if defined(__AVX512F__)
    return (Words)_mm512_permutexvar_epi32((__m512i)code, (__m512i)table.part[0]);
#elif defined(__AVX2__)
    const __m256 low = (__m256)_mm256_permutevar8x32_epi32((__m256i)table.part[0], (__m256i)code);
    const __m256 high = (__m256)_mm256_permutevar8x32_epi32((__m256i)table.part[1], (__m256i)code);
    return (Words)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
    Words found;
    for (int i = 0; i < W; ++i) found[i] = table.part[(code[i] & 15u) / W][code[i] % W];
    return found;
#endif
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
