// NF4 and FP4: one code path; the two differ by their tables only.
#include <type_traits>

#include "formats.hpp"
#include "isa.hpp"

namespace distquant {
namespace DISTQUANT_ISA {
namespace {

// Smallest divisor: keeps a block of zeros from dividing by zero. A denormal, on purpose: it is the reference's.
inline float at_least_tiny(float x) { return x < 1e-38f ? 1e-38f : x; }  // NaN stays

// The 15 thresholds, laid out for a search that halves them four times. The rank of a value is the number of thresholds
// below it. The comparison is "not less or equal" rather than "greater", so that NaN gets the highest rank.
struct Search {
    Floats thresholds[15];  // for the portable search: each in every lane
    Floats first, second_low, second_high, third, fourth;
    Words order;
    const uint8_t *codes;

    explicit Search(const Quantize4bit &a) : codes(a.order) {
        const float *t = a.thresholds;
        for (int i = 0; i < 15; ++i) thresholds[i] = all(t[i]);
        first = all(t[7]);
        second_low = all(t[3]);
        second_high = all(t[11]);
        float at_third[16] = {}, at_fourth[16] = {};
        uint32_t as_words[16];
        for (int i = 0; i < 16; ++i) as_words[i] = a.order[i];
#if defined(__AVX512F__)
        for (int i = 0; i < 14; ++i) at_third[i] = t[i + 1];
        for (int i = 0; i < 15; ++i) at_fourth[i] = t[i];
#else
        for (int i = 0; i < 4; ++i) at_third[i] = t[4 * i + 1];
        for (int i = 0; i < 8; ++i) at_fourth[i] = t[2 * i];
#endif
        third = load<Floats>(at_third);
        fourth = load<Floats>(at_fourth);
        order = load<Words>(as_words);
    }
};

DISTQUANT_INLINE Words rank(const Search &s, Floats x) {
#if defined(__AVX512F__)
    const __m512 v = (__m512)x;
    __mmask16 up = _mm512_cmp_ps_mask(v, (__m512)s.first, _CMP_NLE_UQ);
    __m512 t = _mm512_mask_blend_ps(up, (__m512)s.second_low, (__m512)s.second_high);
    __m512i at = _mm512_maskz_set1_epi32(up, 8);
    up = _mm512_cmp_ps_mask(v, t, _CMP_NLE_UQ);
    at = _mm512_mask_or_epi32(at, up, at, _mm512_set1_epi32(4));
    up = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(at, (__m512)s.third), _CMP_NLE_UQ);
    at = _mm512_mask_or_epi32(at, up, at, _mm512_set1_epi32(2));
    up = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(at, (__m512)s.fourth), _CMP_NLE_UQ);
    return (Words)_mm512_mask_or_epi32(at, up, at, _mm512_set1_epi32(1));
#elif defined(__AVX2__)
    // A comparison yields -1, so `2 at - up` appends one bit to the position.
    const __m256 v = (__m256)x;
    __m256 up = _mm256_cmp_ps(v, (__m256)s.first, _CMP_NLE_UQ);
    Words at = -(Words)up;
    up = _mm256_cmp_ps(v, _mm256_blendv_ps((__m256)s.second_low, (__m256)s.second_high, up), _CMP_NLE_UQ);
    at = at + at - (Words)up;
    up = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps((__m256)s.third, (__m256i)at), _CMP_NLE_UQ);
    at = at + at - (Words)up;
    up = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps((__m256)s.fourth, (__m256i)at), _CMP_NLE_UQ);
    return at + at - (Words)up;
#else
    Signed at = Signed{} + 15;
    for (int i = 0; i < 15; ++i) at += (Signed)(x <= s.thresholds[i]);
    return (Words)at;
#endif
}

// Ranks of W even and W odd elements -> W bytes of codes, the even one in the high nibble.
template <bool ordered>
DISTQUANT_INLINE void put(const Search &s, Words even, Words odd, uint8_t *to) {
#if defined(__AVX512F__)
    if (!ordered) {
        even = (Words)_mm512_permutexvar_epi32((__m512i)even, (__m512i)s.order);
        odd = (Words)_mm512_permutexvar_epi32((__m512i)odd, (__m512i)s.order);
    }
    store_low_bytes(to, (even << 4) | odd);
#elif defined(__AVX2__)
    store_low_bytes(to, (even << 4) | odd);
    if (!ordered) {
        const __m128i map = _mm_loadu_si128((const __m128i *)s.codes), low = _mm_set1_epi8(15);
        const __m128i both = _mm_loadl_epi64((const __m128i *)to);
        const __m128i first = _mm_shuffle_epi8(map, _mm_and_si128(_mm_srli_epi16(both, 4), low));
        const __m128i second = _mm_shuffle_epi8(map, _mm_and_si128(both, low));
        _mm_storel_epi64((__m128i *)to, _mm_or_si128(_mm_slli_epi16(first, 4), second));
    }
#else
    for (int i = 0; i < W; ++i) to[i] = (uint8_t)((s.codes[even[i]] << 4) | s.codes[odd[i]]);
#endif
}

template <class T, bool ordered, bool divide>
DISTQUANT_INLINE void encode(const Search &s, const uint8_t *from, int64_t count, float by, uint8_t *to) {
    const Floats factor = all(by);
    int64_t i = 0;
    for (; i + 2 * W <= count; i += 2 * W) {
        const Pair x = T::read_pairs(from + i * T::bytes);
        put<ordered>(s, rank(s, divide ? x.even / factor : x.even * factor),
                     rank(s, divide ? x.odd / factor : x.odd * factor), to + i / 2);
    }
    if (i < count) {
        uint8_t rest[2 * W * T::bytes] = {}, found[W];
        std::memcpy(rest, from + i * T::bytes, (size_t)((count - i) * T::bytes));
        const Pair x = T::read_pairs(rest);
        put<ordered>(s, rank(s, divide ? x.even / factor : x.even * factor),
                     rank(s, divide ? x.odd / factor : x.odd * factor), found);
        std::memcpy(to + i / 2, found, (size_t)((count - i) / 2));
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)

// Blocks of bfloat16, sixteen elements a vector. Instead of scaling every element, the thresholds are rounded down to
// the grid of bfloat16, once a block. Ranks are then found among 16-bit integers, which are ordered as the floats are.
//
// With its roundings, `x * reciprocal > t` is true if x exceeds `t * absmax` by more than 3 parts in 2^24, and false if
// x is smaller by as much: there are three roundings. If no threshold is that near to a point of the grid, comparing
// with the next point below it decides every x as the product does. If one is (two blocks in a thousand), the block is
// left to `encode`, and so is a block with an absmax at the ends of float32's range.
struct Grid {
    static constexpr int64_t run = 64;                       // elements that are packed at once
    static constexpr float lowest = 0x1p-100f, highest = 0x1p100f;  // no product near a threshold is a denormal

    // Every second threshold, for the last step of the search; the others where the third step looks them up, in between
    // those of the first and the second.
    __m256 even, rest, even_flip, rest_flip;
    __m256i even_below, rest_below;
    bool usable = true;

    explicit Grid(const Quantize4bit &a) {
        static constexpr int kRest[8] = {1, 7, 5, 3, 9, 11, 13, 13};
        float at_even[8], at_rest[8];
        for (int i = 0; i < 8; ++i) {
            at_even[i] = a.thresholds[2 * i];
            at_rest[i] = a.thresholds[kRest[i]];
            usable = usable && at_even[i] != 0 && at_rest[i] != 0;
        }
        even = _mm256_loadu_ps(at_even);
        rest = _mm256_loadu_ps(at_rest);
        even_below = _mm256_srai_epi32(_mm256_castps_si256(even), 31);
        rest_below = _mm256_srai_epi32(_mm256_castps_si256(rest), 31);
        even_flip = _mm256_castsi256_ps(_mm256_srli_epi32(even_below, 1));
        rest_flip = _mm256_castsi256_ps(_mm256_srli_epi32(rest_below, 1));
    }
};

// Points of the grid as integers in the order of the floats: the magnitude bits of negative ones are inverted.
DISTQUANT_INLINE __m256i to_grid(__m256 scaled, __m256 flip, __m256i below) {
    return _mm256_add_epi32(_mm256_srai_epi32(_mm256_castps_si256(_mm256_xor_ps(scaled, flip)), 16), below);
}

DISTQUANT_INLINE __m256i off_grid(__m256 scaled) {  // 0 in a lane that is within 4 units of the grid
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(scaled), _mm256_set1_epi32(4));
    return _mm256_and_si256(bits, _mm256_set1_epi32(0xfff8));
}

// `rank(x) * 0x101 + 0x100` without the last bit of the upper byte; only `low` of that byte is used.
struct GridTables {
    __m256i first, second_low, second_high, third, fourth;
};

DISTQUANT_INLINE __m256i rank(const GridTables &t, __m256i x) {
    const __m256i sign = _mm256_srli_epi16(_mm256_srai_epi16(x, 15), 1);
    x = _mm256_xor_si256(x, sign);
    __m256i up = _mm256_cmpgt_epi16(x, t.first);
    __m256i at = _mm256_or_si256(_mm256_and_si256(up, _mm256_set1_epi16(0x0808)), _mm256_set1_epi16(0x0100));
    up = _mm256_cmpgt_epi16(x, _mm256_blendv_epi8(t.second_low, t.second_high, up));
    at = _mm256_or_si256(at, _mm256_and_si256(up, _mm256_set1_epi16(0x0404)));
    up = _mm256_cmpgt_epi16(x, _mm256_shuffle_epi8(t.third, at));
    at = _mm256_or_si256(at, _mm256_and_si256(up, _mm256_set1_epi16(0x0202)));
    up = _mm256_cmpgt_epi16(x, _mm256_shuffle_epi8(t.fourth, at));
    return _mm256_sub_epi16(at, up);
}

// Encodes full runs of a block; returns false if it cannot.
DISTQUANT_INLINE bool encode_on_grid(const Grid &g, const uint8_t *from, int64_t count, float absmax, uint8_t *to) {
    if (!g.usable || count % Grid::run || !(absmax >= Grid::lowest && absmax <= Grid::highest)) return false;
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 even = _mm256_mul_ps(g.even, scale), rest = _mm256_mul_ps(g.rest, scale);
    const __m256i near = _mm256_cmpeq_epi32(_mm256_min_epu32(off_grid(even), off_grid(rest)), _mm256_setzero_si256());
    if (!_mm256_testz_si256(near, near)) return false;

    // To 16 bits, all eight in each half of a vector.
    const __m256i fourth = to_grid(even, g.even_flip, g.even_below), third = to_grid(rest, g.rest_flip, g.rest_below);
    GridTables t;
    t.fourth = _mm256_permute4x64_epi64(_mm256_packs_epi32(fourth, fourth), 0x88);
    t.third = _mm256_permute4x64_epi64(_mm256_packs_epi32(third, third), 0x88);
    t.first = _mm256_shuffle_epi8(t.third, _mm256_set1_epi16(0x0302));
    t.second_low = _mm256_shuffle_epi8(t.third, _mm256_set1_epi16(0x0706));
    t.second_high = _mm256_shuffle_epi8(t.third, _mm256_set1_epi16(0x0b0a));

    const __m256i low = _mm256_set1_epi16(15), pair = _mm256_set1_epi32(0x00010010);
    for (int64_t i = 0; i < count; i += Grid::run) {
        __m256i code[4];  // 32 bits each
        for (int j = 0; j < 4; ++j) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(from + 2 * i) + j);
            code[j] = _mm256_madd_epi16(_mm256_and_si256(rank(t, x), low), pair);
        }
        const __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(code[0], code[1]), _mm256_packus_epi32(code[2], code[3]));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing goes by halves
        _mm256_storeu_si256((__m256i *)(to + i / 2), _mm256_permutevar8x32_epi32(bytes, order));
    }
    return true;
}

#endif

template <class T, bool ordered>
void quantize(const Quantize4bit &a, int64_t first, int64_t last) {
    const Search s(a);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const Grid grid(a);
#endif
    const uint8_t *weight = (const uint8_t *)a.weight;
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = block * a.blocksize, left = a.count - start;
        const uint8_t *from = weight + start * T::bytes;
        uint8_t *to = a.codes + start / 2;
        const int64_t count = left < a.blocksize ? left : a.blocksize;
        const bool ragged = left < a.blocksize || (a.ragged && left == a.blocksize);
        if (a.statistics == kComputed) {
            const float found = absmax_of<T>(from, count);
            a.absmax[block] = ragged ? at_least_tiny(found) : found;
        }
        const float absmax = a.absmax[block];
#if defined(__AVX2__) && !defined(__AVX512F__)
        if constexpr (ordered && std::is_same<T, BF16>::value) {
            if (!ragged && encode_on_grid(grid, from, count, absmax, to)) continue;
        }
#endif
        if (ragged)
            encode<T, ordered, true>(s, from, count, absmax, to);
        else
            encode<T, ordered, false>(s, from, count, 1.0f / at_least_tiny(absmax), to);
    }
}

template <class T>
void dequantize(const Dequantize4bit &a, int64_t first, int64_t last) {
    uint8_t *out = (uint8_t *)a.out;
    for (int64_t block = first; block < last; ++block) {
        // A block has only sixteen different results: they are computed and rounded first, then looked up.
        const Floats scale = all(a.absmax[block]);
        Lookup table;
        for (int i = 0; i < 16 / W; ++i) table.part[i] = T::encode(load<Floats>(a.values + i * W) * scale);
        const int64_t start = block * a.blocksize, left = a.count - start;
        const int64_t count = left < a.blocksize ? left : a.blocksize;
        const uint8_t *from = a.codes + start / 2;
        uint8_t *to = out + start * T::bytes;
        int64_t i = 0;
        for (; i + 2 * W <= count; i += 2 * W) {
            const Words code = __builtin_convertvector(load<Bytes>(from + i / 2), Words);
            T::write_pairs(to + i * T::bytes, look_up(table, code >> 4), look_up(table, code));
        }
        if (i < count) {
            uint8_t rest[W] = {}, found[2 * W * T::bytes];
            std::memcpy(rest, from + i / 2, (size_t)((count - i + 1) / 2));
            const Words code = __builtin_convertvector(load<Bytes>(rest), Words);
            T::write_pairs(found, look_up(table, code >> 4), look_up(table, code));
            std::memcpy(to + i * T::bytes, found, (size_t)((count - i) * T::bytes));
        }
    }
}

}  // namespace

void quantize_4bit(const Quantize4bit &a, int64_t first, int64_t last) {
    bool ordered = true;  // true if every rank is its code
    for (int i = 0; i < 16; ++i) ordered = ordered && a.order[i] == i;
#define DISTQUANT_WORK(T) ordered ? quantize<T, true>(a, first, last) : quantize<T, false>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

void dequantize_4bit(const Dequantize4bit &a, int64_t first, int64_t last) {
#define DISTQUANT_WORK(T) dequantize<T>(a, first, last)
    DISTQUANT_BY_FORMAT(a.type, DISTQUANT_WORK)
#undef DISTQUANT_WORK
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
