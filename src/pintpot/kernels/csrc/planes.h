// Putting together numbers whose bytes were stored apart. Callers have threads of their own.
#pragma once

#include "pintpot.h"
#include "simd.h"

namespace {

// The upper 16 bits of numbers, in words.
inline Words top_of(const uint8_t* exponents, const uint8_t* signs) {
    const Words exponent = __builtin_convertvector(load<Bytes>(exponents), Words);
    const Words sign = __builtin_convertvector(load<Bytes>(signs), Words);
    return (sign & 0x80u) << 8 | exponent << 7 | (sign & 0x7fu);
}

inline uint32_t top_of(uint8_t exponent, uint8_t sign) {
    return (sign & 0x80u) << 8 | static_cast<uint32_t>(exponent) << 7 | (sign & 0x7fu);
}

int join_planes(const PintpotPlanes& call) {
    auto* to = static_cast<uint8_t*>(call.output);
    int64_t i = 0;
    if (call.width == 4) {
        for (; i + kLanes <= call.count; i += kLanes) {
            const Words upper = __builtin_convertvector(load<Bytes>(call.upper + i), Words);
            const Words lower = __builtin_convertvector(load<Bytes>(call.lower + i), Words);
            store(to + 4 * i, top_of(call.exponents + i, call.signs + i) << 16 | upper << 8 | lower);
        }
        for (; i < call.count; ++i) {
            const uint32_t upper = call.upper[i], lower = call.lower[i];
            const uint32_t whole = top_of(call.exponents[i], call.signs[i]) << 16 | upper << 8 | lower;
            std::memcpy(to + 4 * i, &whole, 4);
        }
        return 0;
    }
    for (; i + kLanes <= call.count; i += kLanes) {
        store(to + 2 * i, __builtin_convertvector(top_of(call.exponents + i, call.signs + i), Halves));
    }
    for (; i < call.count; ++i) {
        const auto whole = static_cast<uint16_t>(top_of(call.exponents[i], call.signs[i]));
        std::memcpy(to + 2 * i, &whole, 2);
    }
    return 0;
}

}  // namespace
