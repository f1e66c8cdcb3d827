// The interface to Python: plain C, called through ctypes, which releases the interpreter's lock around each call.
//
// Addresses and sizes were checked by the caller, and every integer is 64 bits wide. `isa` is an `Isa`, `type` a
// `Float`; the arguments are those of the structs in `kernels.hpp`. A function returns a `Status`.
#pragma once

#include "kernels.hpp"

#define DISTQUANT_EXPORT extern "C" __attribute__((visibility("default"))) int32_t

namespace distquant {

// Raised whenever a function below changes, so that Python refuses a library of other sources.
constexpr int32_t kInterface = 4;

enum Status : int32_t { kDone = 0, kNoIsa = 1, kNoMemory = 2 };

}  // namespace distquant

DISTQUANT_EXPORT distquant_interface();

// 1 if this build and this machine have the instruction set, else 0.
DISTQUANT_EXPORT distquant_has(int64_t isa);

DISTQUANT_EXPORT distquant_quantize_4bit(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t count,
                                         int64_t blocksize, const float *thresholds, const uint8_t *order,
                                         uint8_t *codes, float *absmax, int64_t statistics, int64_t ragged);

DISTQUANT_EXPORT distquant_dequantize_4bit(int64_t isa, int64_t threads, const uint8_t *codes, const float *absmax,
                                           int64_t count, int64_t blocksize, const float *values, void *out,
                                           int64_t type);

DISTQUANT_EXPORT distquant_quantize_blockwise(int64_t isa, int64_t threads, const float *source, int64_t count,
                                              int64_t blocksize, const uint8_t *nearest, uint8_t *codes,
                                              float *absmax);

DISTQUANT_EXPORT distquant_dequantize_blockwise(int64_t isa, int64_t threads, const uint8_t *codes, const float *absmax,
                                                const float *values, int64_t count, int64_t blocksize, float *out);

DISTQUANT_EXPORT distquant_quantize_int8_rows(int64_t isa, int64_t threads, const void *weight, int64_t type,
                                              int64_t rows, int64_t columns, int8_t *codes, float *absmax,
                                              int64_t statistics);

DISTQUANT_EXPORT distquant_quantize_fp8(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                        int64_t columns, int64_t tile_rows, int64_t tile_columns, uint8_t *codes,
                                        float *scale);

// `powers` (as `scale`) are exponents, ue8m0.
DISTQUANT_EXPORT distquant_quantize_fp8_ue8m0(int64_t isa, int64_t threads, const void *weight, int64_t type,
                                              int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
                                              uint8_t *codes, uint8_t *powers);

// `factors` (as `scale`) holds the amax and is overwritten.
DISTQUANT_EXPORT distquant_encode_fp8(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                      int64_t columns, int64_t tile_rows, int64_t tile_columns, uint8_t *codes,
                                      float *scale, float *factors);

DISTQUANT_EXPORT distquant_dequantize_fp8(int64_t isa, int64_t threads, const uint8_t *codes, const float *scale,
                                          int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
                                          void *out, int64_t type);

// `amax` is [rows, ceil(columns / tile_columns)]: each row's part of the amax of its tiles.
DISTQUANT_EXPORT distquant_row_amax(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                    int64_t columns, int64_t tile_columns, float *amax);

// `kind` is a `Codes`; `low` and `high` bound int8.
DISTQUANT_EXPORT distquant_encode_scaled_rows(int64_t isa, int64_t threads, const void *weight, int64_t type,
                                              int64_t rows, int64_t columns, const float *scale, uint8_t *codes,
                                              int64_t kind, int64_t inverse, int64_t rounded, int64_t low,
                                              int64_t high);

// `zero` null: symmetric.
DISTQUANT_EXPORT distquant_quantize_groups(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t rows,
                                           int64_t columns, int64_t group_size, int64_t bits, int8_t *codes,
                                           void *scale, int8_t *zero);

DISTQUANT_EXPORT distquant_dequantize_groups(int64_t isa, int64_t threads, const int8_t *codes, const float *scale,
                                             const int8_t *zero, int64_t rows, int64_t columns, int64_t group_size,
                                             void *out, int64_t type);

// `count` is a multiple of 32.
DISTQUANT_EXPORT distquant_quantize_mxfp4(int64_t isa, int64_t threads, const void *weight, int64_t type, int64_t count,
                                          uint8_t *codes, uint8_t *scale);

DISTQUANT_EXPORT distquant_dequantize_mxfp4(int64_t isa, int64_t threads, const uint8_t *codes, const uint8_t *scale,
                                            int64_t count, void *out, int64_t type);
