// The exported functions: each chooses the kernels of an instruction set and shares the work among threads.
#include "interface.hpp"

#include <cstring>
#include <memory>
#include <new>

#include "parallel.hpp"

namespace distquant {

namespace portable {
extern const Kernels kernels;
}
#if defined(DISTQUANT_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

const Kernels *kernels_of(int64_t isa) {
    if (isa == kPortable) return &portable::kernels;
#if defined(DISTQUANT_X86)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (isa == kAvx2 && avx2) return &avx2::kernels;
    if (isa == kAvx512 && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &avx512::kernels;
#endif
    return nullptr;
}

namespace {

inline int64_t parts_of(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <class Call>
int32_t run(void (*kernel)(const Call &, int64_t, int64_t), const Call &call, int64_t threads, int64_t units,
            int64_t elements) {
    in_parallel(threads, units, elements, [&](int64_t first, int64_t last) { kernel(call, first, last); });
    return kDone;
}

// Turns the amax in `factors` into factors, and writes scales and codes.
int32_t encode_fp8(const Kernels &k, const QuantizeFp8 &call, int64_t threads) {
    const Tiles &t = call.tiles;
    k.factors_fp8(call, 0, t.down() * t.across());
    return run(k.encode_fp8, call, threads, t.rows, t.rows * t.columns);
}

// Tiles as high as the matrix are a single row of tiles. So the threads share the matrix's rows instead, once for the
// amax and once for the codes. In between, the amax of the rows become those of the tiles.
int32_t quantize_one_band(const Kernels &k, QuantizeFp8 &call, int64_t threads) {
    const Tiles &t = call.tiles;
    const int64_t across = t.across();
    const std::unique_ptr<float[]> amax(new (std::nothrow) float[(size_t)(t.rows * across)]);
    const std::unique_ptr<float[]> factors(new (std::nothrow) float[(size_t)across]);
    if (!amax || !factors) return kNoMemory;
    call.amax = amax.get();
    call.factors = factors.get();
    run(k.amax_fp8, call, threads, t.rows, t.rows * t.columns);
    for (int64_t tile = 0; tile < across; ++tile) {
        uint32_t largest = 0;  // as integers, magnitudes keep their order, and NaN is above all
        for (int64_t row = 0; row < t.rows; ++row) {
            uint32_t bits;
            std::memcpy(&bits, &amax[(size_t)(row * across + tile)], sizeof bits);
            largest = bits > largest ? bits : largest;
        }
        std::memcpy(&factors[(size_t)tile], &largest, sizeof largest);
    }
    return encode_fp8(k, call, threads);
}

}  // namespace
}  // namespace distquant

using namespace distquant;

#define DISTQUANT_KERNELS(isa)                   \
    const Kernels *k = kernels_of(isa);          \
    if (k == nullptr) return kNoIsa

DISTQUANT_EXPORT distquant_interface() { return kInterface; }

DISTQUANT_EXPORT distquant_has(int64_t isa) { return kernels_of(isa) != nullptr; }

DISTQUANT_EXPORT distquant_quantize_4bit(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t count,
                                         int64_t blocksize, const float *thresholds, const uint8_t *order,
                                         uint8_t *codes, float *absmax, int64_t statistics, int64_t ragged) {
    DISTQUANT_KERNELS(isa);
    const Quantize4bit call = {
        weight, (Float)type, count, blocksize, thresholds, order, codes, absmax, (Statistics)statistics, ragged != 0};
    return run(k->quantize_4bit, call, threads, parts_of(count, blocksize), count);
}

DISTQUANT_EXPORT distquant_dequantize_4bit(int64_t isa, int64_t threads, const uint8_t *codes, const float *absmax,
                                           int64_t count, int64_t blocksize, const float *values, void *out,
                                           int64_t type) {
    DISTQUANT_KERNELS(isa);
    const Dequantize4bit call = {codes, absmax, count, blocksize, values, out, (Float)type};
    return run(k->dequantize_4bit, call, threads, parts_of(count, blocksize), count);
}

DISTQUANT_EXPORT distquant_quantize_blockwise(int64_t isa, int64_t threads, const float *source, int64_t count,
                                              int64_t blocksize, const uint8_t *nearest, uint8_t *codes,
                                              float *absmax) {
    DISTQUANT_KERNELS(isa);
    const QuantizeBlockwise call = {source, count, blocksize, nearest, codes, absmax};
    return run(k->quantize_blockwise, call, threads, parts_of(count, blocksize), count);
}

DISTQUANT_EXPORT distquant_dequantize_blockwise(int64_t isa, int64_t threads, const uint8_t *codes, const float *absmax,
                                                const float *values, int64_t count, int64_t blocksize, float *out) {
    DISTQUANT_KERNELS(isa);
    const DequantizeBlockwise call = {codes, absmax, values, count, blocksize, out};
    return run(k->dequantize_blockwise, call, threads, parts_of(count, blocksize), count);
}

DISTQUANT_EXPORT distquant_quantize_int8_rows(int64_t isa, int64_t threads, const void *weight, int64_t type,
                                              int64_t rows, int64_t columns, int8_t *codes, float *absmax,
                                              int64_t statistics) {
    DISTQUANT_KERNELS(isa);
    const QuantizeInt8Rows call = {weight, (Float)type, columns, codes, absmax, (Statistics)statistics};
    return run(k->quantize_int8_rows, call, threads, rows, rows * columns);
}

DISTQUANT_EXPORT distquant_quantize_fp8(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                        int64_t columns, int64_t tile_rows, int64_t tile_columns, uint8_t *codes,
                                        float *scale) {
    DISTQUANT_KERNELS(isa);
    const Tiles tiles = {rows, columns, tile_rows, tile_columns};
    QuantizeFp8 call = {weight, (Float)type, tiles, codes, scale, nullptr, nullptr, nullptr};
    if (rows > 1 && tile_rows >= rows) return quantize_one_band(*k, call, threads);
    return run(k->quantize_fp8, call, threads, tiles.down(), rows * columns);
}

DISTQUANT_EXPORT distquant_quantize_fp8_ue8m0(int64_t isa, int64_t threads, const void *weight, int64_t type,
                                              int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
                                              uint8_t *codes, uint8_t *powers) {
    DISTQUANT_KERNELS(isa);
    const Tiles tiles = {rows, columns, tile_rows, tile_columns};
    const QuantizeFp8 call = {weight, (Float)type, tiles, codes, nullptr, powers, nullptr, nullptr};
    return run(k->quantize_fp8, call, threads, tiles.down(), rows * columns);
}

DISTQUANT_EXPORT distquant_encode_fp8(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                      int64_t columns, int64_t tile_rows, int64_t tile_columns, uint8_t *codes,
                                      float *scale, float *factors) {
    DISTQUANT_KERNELS(isa);
    const Tiles tiles = {rows, columns, tile_rows, tile_columns};
    return encode_fp8(*k, {weight, (Float)type, tiles, codes, scale, nullptr, nullptr, factors}, threads);
}

DISTQUANT_EXPORT distquant_dequantize_fp8(int64_t isa, int64_t threads, const uint8_t *codes, const float *scale,
                                          int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
                                          void *out, int64_t type) {
    DISTQUANT_KERNELS(isa);
    const DequantizeFp8 call = {codes, scale, {rows, columns, tile_rows, tile_columns}, out, (Float)type};
    return run(k->dequantize_fp8, call, threads, rows, rows * columns);
}

DISTQUANT_EXPORT distquant_row_amax(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                    int64_t columns, int64_t tile_columns, float *amax) {
    DISTQUANT_KERNELS(isa);
    const Tiles tiles = {rows, columns, 1, tile_columns};
    const QuantizeFp8 call = {weight, (Float)type, tiles, nullptr, nullptr, nullptr, amax, nullptr};
    return run(k->amax_fp8, call, threads, rows, rows * columns);
}

DISTQUANT_EXPORT distquant_encode_scaled_rows(int64_t isa, int64_t threads, const void *weight, int64_t type,
                                              int64_t rows, int64_t columns, const float *scale, uint8_t *codes,
                                              int64_t kind, int64_t inverse, int64_t rounded, int64_t low,
                                              int64_t high) {
    DISTQUANT_KERNELS(isa);
    const EncodeScaledRows call = {weight, (Float)type, columns,      scale,      codes, (Codes)kind,
                                   inverse != 0, rounded != 0, (float)low, (float)high};
    return run(k->encode_scaled_rows, call, threads, rows, rows * columns);
}

DISTQUANT_EXPORT distquant_quantize_groups(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                           int64_t columns, int64_t group_size, int64_t bits, int8_t *codes,
                                           void *scale, int8_t *zero) {
    DISTQUANT_KERNELS(isa);
    const QuantizeGroups call = {weight, (Float)type, columns, group_size, (int32_t)bits, codes, scale, zero};
    return run(k->quantize_groups, call, threads, rows, rows * columns);
}

DISTQUANT_EXPORT distquant_dequantize_groups(int64_t isa, int64_t threads, const int8_t *codes, const float *scale,
                                             const int8_t *zero, int64_t rows, int64_t columns, int64_t group_size,
                                             void *out, int64_t type) {
    DISTQUANT_KERNELS(isa);
    const DequantizeGroups call = {codes, scale, zero, columns, group_size, out, (Float)type};
    return run(k->dequantize_groups, call, threads, rows, rows * columns);
}

DISTQUANT_EXPORT distquant_quantize_mxfp4(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t count,
                                          uint8_t *codes, uint8_t *scale) {
    DISTQUANT_KERNELS(isa);
    const QuantizeMxfp4 call = {weight, (Float)type, codes, scale};
    return run(k->quantize_mxfp4, call, threads, count / kRun, count);
}

DISTQUANT_EXPORT distquant_dequantize_mxfp4(int64_t isa, int64_t threads, const uint8_t *codes, const uint8_t *scale,
                                            int64_t count, void *out, int64_t type) {
    DISTQUANT_KERNELS(isa);
    const DequantizeMxfp4 call = {codes, scale, out, (Float)type};
    return run(k->dequantize_mxfp4, call, threads, count / kRun, count);
}
