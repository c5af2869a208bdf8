// Putting together numbers whose bytes were stored apart. Callers have threads of their own.
#pragma once

#include "pintpot.h"
#include "simd.h"

namespace {

// Loops as plain as these are made into vectors by the compiler, better than the vector types are converted by it.
inline void join_halves(const uint8_t* __restrict exponents, const uint8_t* __restrict signs, int64_t count,
                        uint16_t* __restrict to) {
    for (int64_t i = 0; i < count; ++i) {
        to[i] = static_cast<uint16_t>((signs[i] & 0x80) << 8 | exponents[i] << 7 | (signs[i] & 0x7f));
    }
}

inline void join_words(const PintpotPlanes& call, uint32_t* __restrict to) {
    const uint8_t *__restrict exponents = call.exponents, *__restrict signs = call.signs;
    const uint8_t *__restrict upper = call.upper, *__restrict lower = call.lower;
    for (int64_t i = 0; i < call.count; ++i) {
        const uint32_t sign = signs[i], exponent = exponents[i], next = upper[i];
        to[i] = (sign & 0x80u) << 24 | exponent << 23 | (sign & 0x7fu) << 16 | next << 8 | lower[i];
    }
}

int join_planes(const PintpotPlanes& call) {
    if (call.width == 4) {
        join_words(call, static_cast<uint32_t*>(call.output));
    } else {
        join_halves(call.exponents, call.signs, call.count, static_cast<uint16_t*>(call.output));
    }
    return 0;
}

}  // namespace
