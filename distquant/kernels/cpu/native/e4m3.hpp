// The float8 format e4m3: no infinities, one NaN, and 448 is the largest.
#pragma once

#include "lanes.hpp"

namespace distquant {
namespace DISTQUANT_ISA {

constexpr uint32_t kE4m3Nan = 0x7f;

// float32 -> e4m3 in the low byte, clamped, to nearest even.
DISTQUANT_INLINE Words to_e4m3(Floats x) {
    const Words magnitude = (Words)x & 0x7fffffffu;
    const Words largest = all_bits(0x43e00000);  // 448
    const Words u = select((Signed)(magnitude > largest), largest, magnitude);
    const Words normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3);
    const Words denormal = (Words)((Floats)u + 0x1p14f) - 0x46800000u;  // the sum rounds at 2^-9, the smallest e4m3
    const Words code = select((Signed)(u < 0x3c800000u), denormal, normal) | (((Words)x >> 24) & 0x80u);
    return select((Signed)(magnitude > 0x7f800000u), all_bits(kE4m3Nan), code);
}

DISTQUANT_INLINE Floats from_e4m3(Words code) {
    const Words magnitude = code & 0x7fu;
    const Words value = (Words)((Floats)(magnitude << 20) * 0x1p120f);  // moves the exponent's bias, denormals too
    return (Floats)(select((Signed)(magnitude == kE4m3Nan), all_bits(0x7fc00000), value) | ((code & 0x80u) << 24));
}

}  // namespace DISTQUANT_ISA
}  // namespace distquant
