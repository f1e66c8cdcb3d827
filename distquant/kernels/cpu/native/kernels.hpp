// The kernels as plain C++: the arguments of each, and the table of one instruction set.
//
// Every kernel works on a range of units (blocks, rows), so that threads can share one call, and their number cannot
// change the result. Pointers are aligned to their elements, no further. Numbers are those of the reference in plain
// torch, bit for bit: compile without contraction of a * b + c and without flushing of denormals.
#pragma once

#include <cstdint>

namespace distquant {

enum Float : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t bytes_of(Float type) { return type == kFloat32 ? 4 : 2; }

// The origin of statistics: computed from the weight, or given by the caller and only read.
enum Statistics : int32_t { kComputed = 0, kGiven = 1 };

// Unit: a block. `count` is even; a ragged last block is divided by its absmax, the others are multiplied by its
// reciprocal. A block shorter than `blocksize` is ragged, and so is the last block if `ragged` is set.
struct Quantize4bit {
    const void *weight;
    Float type;
    int64_t count;
    int64_t blocksize;        // even
    const float *thresholds;  // [15] ascending
    const uint8_t *order;     // [16] rank -> code
    uint8_t *codes;           // [count / 2]
    float *absmax;            // [ceil(count / blocksize)]
    Statistics statistics;
    bool ragged;
};

// Unit: a block.
struct Dequantize4bit {
    const uint8_t *codes;
    const float *absmax;
    int64_t count;
    int64_t blocksize;    // even
    const float *values;  // [16] by code
    void *out;
    Float type;
};

// Unit: a block.
struct QuantizeBlockwise {
    const float *source;
    int64_t count;
    int64_t blocksize;
    const uint8_t *nearest;  // [65536] code of each grid point of [-1, 1]
    uint8_t *codes;
    float *absmax;
};

// Unit: a block.
struct DequantizeBlockwise {
    const uint8_t *codes;
    const float *absmax;
    const float *values;  // [256]
    int64_t count;
    int64_t blocksize;
    float *out;
};

// Unit: a row.
struct QuantizeInt8Rows {
    const void *weight;
    Float type;
    int64_t columns;
    int8_t *codes;
    float *absmax;
    Statistics statistics;
};

// Tiles of a matrix `[rows, columns]`, the last of each row and column ragged.
struct Tiles {
    int64_t rows, columns;
    int64_t tile_rows, tile_columns;
    int64_t across() const { return (columns + tile_columns - 1) / tile_columns; }
    int64_t down() const { return (rows + tile_rows - 1) / tile_rows; }
};

// Units: a row of tiles for `quantize_fp8`, which does all; a row for `amax_fp8`, which computes each row's part of the
// amax of its tiles; a tile for `factors_fp8`, which turns amax into scales and factors; a row for `encode_fp8`.
struct QuantizeFp8 {
    const void *weight;
    Float type;
    Tiles tiles;
    uint8_t *codes;
    float *scale;    // [down, across], or null: `powers`
    uint8_t *powers;  // the same, of `quantize_fp8`: scales that are powers of two, as their exponents (ue8m0)
    float *amax;     // [rows, across], of `amax_fp8`
    float *factors;  // [down, across], `factors_fp8` reads the amax from it
};

// Unit: a row.
struct DequantizeFp8 {
    const uint8_t *codes;
    const float *scale;  // [down, across]
    Tiles tiles;
    void *out;
    Float type;
};

// The codes of scaled rows.
enum Codes : int32_t { kInt8 = 0, kE4m3 = 1 };

// Unit: a row. A row whose scale is 0 has codes of 0.
struct EncodeScaledRows {
    const void *weight;
    Float type;
    int64_t columns;
    const float *scale;  // [rows]
    uint8_t *codes;
    Codes type_of_codes;
    bool inverse;     // times the scale's reciprocal, not divided by the scale
    bool rounded;     // the quotient is rounded to `type` first
    float low, high;  // integers; bounds of int8
};

// Unit: a row.
struct QuantizeGroups {
    const void *weight;
    Float type;
    int64_t columns;
    int64_t group_size;
    int32_t bits;
    int8_t *codes;
    void *scale;   // [rows, ceil(columns / group_size)], of `type`
    int8_t *zero;  // as `scale`, or null: symmetric
};

// Unit: a row.
struct DequantizeGroups {
    const int8_t *codes;
    const float *scale;  // [rows, ceil(columns / group_size)]
    const int8_t *zero;  // as `scale`, or null
    int64_t columns;
    int64_t group_size;
    void *out;
    Float type;
};

// Elements that share a scale of MXFP4.
constexpr int64_t kRun = 32;

// Unit: a run.
struct QuantizeMxfp4 {
    const void *weight;
    Float type;
    uint8_t *codes;  // [runs, kRun / 2]
    uint8_t *scale;  // [runs]
};

// Unit: a run.
struct DequantizeMxfp4 {
    const uint8_t *codes;
    const uint8_t *scale;
    void *out;
    Float type;
};

struct Kernels {
    void (*quantize_4bit)(const Quantize4bit &, int64_t first, int64_t last);
    void (*dequantize_4bit)(const Dequantize4bit &, int64_t first, int64_t last);
    void (*quantize_blockwise)(const QuantizeBlockwise &, int64_t first, int64_t last);
    void (*dequantize_blockwise)(const DequantizeBlockwise &, int64_t first, int64_t last);
    void (*quantize_int8_rows)(const QuantizeInt8Rows &, int64_t first, int64_t last);
    void (*quantize_fp8)(const QuantizeFp8 &, int64_t first, int64_t last);
    void (*amax_fp8)(const QuantizeFp8 &, int64_t first, int64_t last);
    void (*factors_fp8)(const QuantizeFp8 &, int64_t first, int64_t last);
    void (*encode_fp8)(const QuantizeFp8 &, int64_t first, int64_t last);
    void (*dequantize_fp8)(const DequantizeFp8 &, int64_t first, int64_t last);
    void (*encode_scaled_rows)(const EncodeScaledRows &, int64_t first, int64_t last);
    void (*quantize_groups)(const QuantizeGroups &, int64_t first, int64_t last);
    void (*dequantize_groups)(const DequantizeGroups &, int64_t first, int64_t last);
    void (*quantize_mxfp4)(const QuantizeMxfp4 &, int64_t first, int64_t last);
    void (*dequantize_mxfp4)(const DequantizeMxfp4 &, int64_t first, int64_t last);
};

// Instruction sets in ascending order; the numbers are part of the interface to Python.
enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The kernels of one instruction set, or null if this build or this machine lacks it.
const Kernels *kernels_of(int64_t isa);

}  // namespace distquant
