// Calls every kernel of every instruction set on buffers of exactly the size that it may touch, under sanitizers.
//
// Sizes are odd ones around the widths of vectors and blocks, pointers are aligned to their elements and no further,
// and several threads share the work. Results must be the same for every instruction set and number of threads.
//
//     driver             all of it
//     driver overrun     reads one element too many: a sanitizer must stop it, or the run above proves nothing
//     driver quick       one size and one format, for the thread sanitizer

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "interface.hpp"

using namespace distquant;

namespace {

// `count` elements at the end of a heap block of their own, `skew` elements from its start.
template <class T>
class Exact {
public:
    explicit Exact(int64_t count, int64_t skew = 1)
        : block_((T *)std::malloc((size_t)(count + skew) * sizeof(T))), count_(count), skew_(skew) {
        if (count) std::memset(at(), 0xa5, (size_t)count * sizeof(T));
    }
    ~Exact() { std::free(block_); }
    Exact(const Exact &) = delete;
    Exact &operator=(const Exact &) = delete;
    T *at() const { return block_ + skew_; }
    std::string bytes() const { return std::string((const char *)at(), (size_t)count_ * sizeof(T)); }

private:
    T *block_;
    int64_t count_, skew_;
};

std::mt19937 random_bits(1);

// Weights of any format: mostly ordinary, and sometimes any finite bits at all (denormals too). No NaN, whose payload
// may differ.
class Weight {
public:
    Weight(int64_t count, Float type) : bytes_(count * bytes_of(type), bytes_of(type)), type_(type) {
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits = random_bits();
            if (type == kFloat32) {
                if ((bits & 0x7f800000u) == 0x7f800000u || bits % 16) bits = (bits & 0x81ffffffu) | 0x3c000000u;
                std::memcpy(bytes_.at() + i * 4, &bits, 4);
            } else {
                const uint32_t exponent = type == kFloat16 ? 0x7c00u : 0x7f80u;
                uint16_t half = (uint16_t)bits;
                if ((half & exponent) == exponent || (bits >> 16) % 16) half = (half & 0x83ffu) | 0x3800u;
                std::memcpy(bytes_.at() + i * 2, &half, 2);
            }
        }
    }
    const void *at() const { return bytes_.at(); }
    Float type() const { return type_; }

private:
    Exact<uint8_t> bytes_;
    Float type_;
};

void must(bool holds, const std::string &what) {
    if (holds) return;
    std::fprintf(stderr, "driver: %s\n", what.c_str());
    std::exit(1);
}

long calls = 0;

// Runs one kernel on all instruction sets and numbers of threads; `work` returns the bytes that it wrote.
void on_all(const std::string &what, const std::function<std::string(int64_t isa, int64_t threads)> &work) {
    std::string first;
    for (int64_t isa = kPortable; isa <= kAvx512; ++isa) {
        if (!distquant_has(isa)) continue;
        for (int64_t threads = 1; threads <= 3; ++threads) {
            const std::string found = work(isa, threads);
            if (first.empty()) first = found;
            const std::string where = " on isa " + std::to_string(isa) + ", threads " + std::to_string(threads);
            must(found == first, what + " differs" + where);
            ++calls;
        }
    }
}

void fill_codes(uint8_t *codes, int64_t count, bool fp8 = false) {
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = (uint8_t)random_bits();
        if (fp8 && (codes[i] & 0x7f) == 0x7f) codes[i] = 0;
    }
}

void fill_scales(float *scales, int64_t count) {
    for (int64_t i = 0; i < count; ++i) scales[i] = (float)(random_bits() % 1000) / 999.0f;
}

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

void four_bit(int64_t count, int64_t blocksize, Float type) {
    const int64_t blocks = parts(count, blocksize);
    const Weight weight(count, type);
    Exact<float> thresholds(15), values(16);
    for (int i = 0; i < 15; ++i) thresholds.at()[i] = -0.9f + 0.125f * (float)i;
    for (int i = 0; i < 16; ++i) values.at()[i] = -1.0f + 0.13f * (float)i;
    for (int reversed = 0; reversed < 2; ++reversed) {
        Exact<uint8_t> order(16);
        for (int i = 0; i < 16; ++i) order.at()[i] = (uint8_t)(reversed ? 15 - i : i);
        on_all("quantize_4bit", [&](int64_t isa, int64_t threads) {
            Exact<uint8_t> codes(count / 2);
            Exact<float> absmax(blocks);
            must(!distquant_quantize_4bit(isa, threads, weight.at(), type, count, blocksize, thresholds.at(),
                                          order.at(), codes.at(), absmax.at(), kComputed, reversed),
                 "status");
            return codes.bytes() + absmax.bytes();
        });
    }
    const int64_t shown = count - 1;  // an odd count ends within a byte
    Exact<uint8_t> codes(parts(shown, 2));
    fill_codes(codes.at(), parts(shown, 2));
    Exact<float> absmax(blocks);
    fill_scales(absmax.at(), blocks);
    on_all("dequantize_4bit", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> out(shown * bytes_of(type), bytes_of(type));
        must(!distquant_dequantize_4bit(isa, threads, codes.at(), absmax.at(), shown, blocksize, values.at(), out.at(),
                                        type),
             "status");
        return out.bytes();
    });
}

void blockwise(int64_t count, int64_t blocksize) {
    const Weight source(count, kFloat32);
    Exact<uint8_t> nearest(65536);
    fill_codes(nearest.at(), 65536);
    Exact<float> values(256), absmax(parts(count, blocksize));
    fill_scales(values.at(), 256);
    Exact<uint8_t> codes(count);
    on_all("quantize_blockwise", [&](int64_t isa, int64_t threads) {
        must(!distquant_quantize_blockwise(isa, threads, (const float *)source.at(), count, blocksize, nearest.at(),
                                           codes.at(), absmax.at()),
             "status");
        return codes.bytes() + absmax.bytes();
    });
    on_all("dequantize_blockwise", [&](int64_t isa, int64_t threads) {
        Exact<float> out(count);
        for (int64_t i = 0; i < parts(count, blocksize); ++i) absmax.at()[i] = (float)i;
        must(!distquant_dequantize_blockwise(isa, threads, codes.at(), absmax.at(), values.at(), count, blocksize,
                                             out.at()),
             "status");
        return out.bytes();
    });
}

void int8_rows(int64_t rows, int64_t columns, Float type) {
    const Weight weight(rows * columns, type);
    on_all("quantize_int8_rows", [&](int64_t isa, int64_t threads) {
        Exact<int8_t> codes(rows * columns);
        Exact<float> absmax(rows);
        must(!distquant_quantize_int8_rows(isa, threads, weight.at(), type, rows, columns, codes.at(), absmax.at(),
                                           kComputed),
             "status");
        return codes.bytes() + absmax.bytes();
    });
}

void fp8(int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns, Float type) {
    const Weight weight(rows * columns, type);
    const int64_t tiles = parts(rows, tile_rows) * parts(columns, tile_columns);
    on_all("quantize_fp8", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> codes(rows * columns);
        Exact<float> scale(tiles);
        must(!distquant_quantize_fp8(isa, threads, weight.at(), type, rows, columns, tile_rows, tile_columns,
                                     codes.at(), scale.at()),
             "status");
        return codes.bytes() + scale.bytes();
    });
    on_all("quantize_fp8_ue8m0", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> codes(rows * columns), powers(tiles);
        must(!distquant_quantize_fp8_ue8m0(isa, threads, weight.at(), type, rows, columns, tile_rows, tile_columns,
                                           codes.at(), powers.at()),
             "status");
        return codes.bytes() + powers.bytes();
    });
    on_all("encode_fp8", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> codes(rows * columns);
        Exact<float> scale(tiles), factors(tiles);
        for (int64_t i = 0; i < tiles; ++i) factors.at()[i] = (float)i;
        must(!distquant_encode_fp8(isa, threads, weight.at(), type, rows, columns, tile_rows, tile_columns, codes.at(),
                                   scale.at(), factors.at()),
             "status");
        return codes.bytes() + scale.bytes();
    });
    Exact<uint8_t> codes(rows * columns);
    fill_codes(codes.at(), rows * columns, true);
    Exact<float> scale(tiles);
    fill_scales(scale.at(), tiles);
    on_all("dequantize_fp8", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> out(rows * columns * bytes_of(type), bytes_of(type));
        must(!distquant_dequantize_fp8(isa, threads, codes.at(), scale.at(), rows, columns, tile_rows, tile_columns,
                                       out.at(), type),
             "status");
        return out.bytes();
    });
}

void scaled_rows(int64_t rows, int64_t columns, Float type) {
    const Weight weight(rows * columns, type);
    Exact<float> scale(rows);
    fill_scales(scale.at(), rows);
    for (int64_t options = 0; options < 8; ++options)
        on_all("encode_scaled_rows", [&](int64_t isa, int64_t threads) {
            Exact<uint8_t> codes(rows * columns);
            must(!distquant_encode_scaled_rows(isa, threads, weight.at(), type, rows, columns, scale.at(), codes.at(),
                                               options & 1, options >> 1 & 1, options >> 2, -64, 63),
                 "status");
            return codes.bytes();
        });
    for (const int64_t width : {(int64_t)1, (int64_t)32, columns})
        on_all("row_amax", [&](int64_t isa, int64_t threads) {
            Exact<float> amax(rows * parts(columns, width));
            must(!distquant_row_amax(isa, threads, weight.at(), type, rows, columns, width, amax.at()), "status");
            return amax.bytes();
        });
}

void groups(int64_t rows, int64_t columns, int64_t group_size, int64_t bits, Float type) {
    const Weight weight(rows * columns, type);
    const int64_t count = rows * parts(columns, group_size);
    for (int symmetric = 0; symmetric < 2; ++symmetric)
        on_all("quantize_groups", [&](int64_t isa, int64_t threads) {
            Exact<int8_t> codes(rows * columns), zero(count);
            Exact<uint8_t> scale(count * bytes_of(type), bytes_of(type));
            must(!distquant_quantize_groups(isa, threads, weight.at(), type, rows, columns, group_size, bits,
                                            codes.at(), scale.at(), symmetric ? nullptr : zero.at()),
                 "status");
            return codes.bytes() + scale.bytes() + zero.bytes();
        });
    Exact<uint8_t> codes(rows * columns), zero(count);
    fill_codes(codes.at(), rows * columns);
    fill_codes(zero.at(), count);
    Exact<float> scale(count);
    fill_scales(scale.at(), count);
    on_all("dequantize_groups", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> out(rows * columns * bytes_of(type), bytes_of(type));
        must(!distquant_dequantize_groups(isa, threads, (const int8_t *)codes.at(), scale.at(),
                                          (const int8_t *)zero.at(), rows, columns, group_size, out.at(), type),
             "status");
        return out.bytes();
    });
}

void mxfp4(int64_t runs, Float type) {
    const int64_t count = runs * kRun;
    const Weight weight(count, type);
    on_all("quantize_mxfp4", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> codes(count / 2), scale(runs);
        must(!distquant_quantize_mxfp4(isa, threads, weight.at(), type, count, codes.at(), scale.at()), "status");
        return codes.bytes() + scale.bytes();
    });
    Exact<uint8_t> codes(count / 2), scale(runs);
    fill_codes(codes.at(), count / 2);
    for (int64_t i = 0; i < runs; ++i) scale.at()[i] = (uint8_t)(random_bits() % 255);  // not NaN, whose bits may differ
    on_all("dequantize_mxfp4", [&](int64_t isa, int64_t threads) {
        Exact<uint8_t> out(count * bytes_of(type), bytes_of(type));
        must(!distquant_dequantize_mxfp4(isa, threads, codes.at(), scale.at(), count, out.at(), type), "status");
        return out.bytes();
    });
}

int overrun() {
    const Weight weight(64, kFloat32);
    Exact<int8_t> codes(65);
    Exact<float> absmax(1);
    distquant_quantize_int8_rows(kPortable, 1, weight.at(), kFloat32, 1, 65, codes.at(), absmax.at(), kComputed);
    std::puts("driver: read past the end, and nothing stopped it");
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    const std::string mode = argc > 1 ? argv[1] : "";
    if (mode == "overrun") return overrun();
    // The last size is large enough for three threads.
    std::vector<int64_t> sizes = {2, 4, 14, 30, 32, 34, 62, 64, 66, 94, 126, 128, 130, 190, 258, 1000, 4098, 400002};
    std::vector<Float> types = {kFloat32, kFloat16, kBFloat16};
    if (mode == "quick") {
        sizes = {400002};
        types = {kBFloat16};
    }
    for (const Float type : types) {
        for (const int64_t size : sizes) {
            for (const int64_t blocksize : {32, 34, 64, 256, 4096}) four_bit(size, blocksize, type);
            const int64_t rows = size < 1000 ? 3 : 401, columns = size < 1000 ? size - 1 : size / 400;
            int8_rows(rows, columns, type);
            scaled_rows(rows, columns, type);
            mxfp4(parts(size, kRun), type);
            fp8(rows, columns, rows, columns, type);
            fp8(rows, columns, 1, columns, type);
            fp8(rows, columns, 2, 16, type);
            fp8(rows, columns, 128, 128, type);
            for (const int64_t bits : {4, 8})
                for (const int64_t group_size : {1, 7, 32, 128}) groups(rows, columns, group_size, bits, type);
        }
    }
    for (const int64_t size : sizes)
        for (const int64_t blocksize : {7, 256}) blockwise(size - 1, blocksize);
    std::printf("driver: %ld calls, every result the same on all instruction sets and threads\n", calls);
    return 0;
}
