// Rounding to the lattices of rounding.py, bit for bit as its definition does it.
#pragma once

#include <type_traits>

#include "packing.h"
#include "parallel.h"
#include "philox.h"
#include "pintpot.h"
#include "simd.h"

namespace {

// Numbered as the modes in rounding.py.
enum Mode : int64_t { kNearest, kUp, kDown, kTowardZero, kTiesToZero, kTiesAway, kToOdd, kStochastic, kEqual };

inline Floats power_of_two(Ints exponent) { return reinterpret_cast<Floats>((exponent + 127) << 23); }

inline Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }

// Whether magnitudes of `whole + rest` steps become one step more than `whole`.
template <Mode mode>
inline Ints goes_up(Floats x, Ints whole, Floats rest, Words random) {
    const Ints inexact = rest > 0.0f;
    if constexpr (mode == kNearest) return (rest > 0.5f) | ((rest == 0.5f) & ((whole & 1) != 0));
    if constexpr (mode == kUp) return inexact & (x > 0.0f);
    if constexpr (mode == kDown) return inexact & (x < 0.0f);
    if constexpr (mode == kTiesToZero) return rest > 0.5f;
    if constexpr (mode == kTiesAway) return rest >= 0.5f;
    if constexpr (mode == kToOdd) return inexact & ((whole & 1) == 0);
    const Ints chance = reinterpret_cast<Ints>(random >> 8);
    if constexpr (mode == kStochastic) return __builtin_convertvector(chance, Floats) < rest * 16777216.0f;
    if constexpr (mode == kEqual) return inexact & (chance < (1 << 23));
    return Ints{};
}

template <Mode mode>
inline Floats round_lanes(const PintpotRounding& call, Floats x, Words random) {
    const Floats size = magnitude(x);
    // Subnormal numbers are made normal; zero has an exponent that no other number has, and a fraction of its own.
    const Ints tiny = size < 1.17549435e-38f;
    const Words bits = bits_of(tiny ? size * 4294967296.0f : size);
    const Ints exponent = reinterpret_cast<Ints>(bits >> 23) - 127 - (tiny & 32);
    const Floats found = reinterpret_cast<Floats>((bits & 0x7fffffu) | 0x3f800000u);
    const Floats fraction = size == 0.0f ? Floats{} : found;
    const Ints least = Ints{} + static_cast<int32_t>(call.least_exponent);
    const Ints place = (exponent > least ? exponent : least) - static_cast<int32_t>(call.digits);
    const Ints shift = exponent - place, floor = Ints{} - 61;
    const Floats steps = fraction * power_of_two(shift > floor ? shift : floor);
    Ints whole = __builtin_convertvector(steps, Ints);
    whole -= goes_up<mode>(x, whole, steps - __builtin_convertvector(whole, Floats), random);
    const Ints normal = Ints{} - 126, first = place > normal ? place : normal;
    Floats rounded = __builtin_convertvector(whole, Floats) * power_of_two(first) * power_of_two(place - first);
    if (call.flushes) rounded = size < power_of_two(least) ? Floats{} : rounded;
    rounded = reinterpret_cast<Floats>(bits_of(rounded) | (bits_of(x) & 0x80000000u));
    rounded = rounded > call.high ? all(call.above) : rounded;
    rounded = rounded < call.low ? all(call.below) : rounded;
    rounded = x == INFINITY ? all(call.most) : rounded;
    rounded = x == -INFINITY ? all(call.least) : rounded;
    return x == x ? rounded : x;
}

// Numbers `begin` to `end`; `begin` is that of a block of random words.
template <Mode mode, typename Number>
void round_range(const PintpotRounding& call, const Number* from, Number* to, int64_t begin, int64_t end) {
    constexpr bool draws = mode == kStochastic || mode == kEqual;
    alignas(64) uint32_t random[kRandomBlock] = {};
    for (int64_t start = begin; start < end; start += kRandomBlock) {
        const int64_t count = end - start < kRandomBlock ? end - start : kRandomBlock;
        if constexpr (draws) {
            random_block(static_cast<uint64_t>(start / kRandomBlock), static_cast<uint64_t>(call.seed),
                         static_cast<uint64_t>(call.stream), random);
        }
        for (int64_t i = 0; i < count; i += kLanes) {
            const Words words = load<Words>(random + i);
            if (count - i >= kLanes) {
                put_all(to + start + i, round_lanes<mode>(call, numbers(from + start + i), words));
                continue;
            }
            const size_t left = sizeof(Number) * static_cast<size_t>(count - i);
            Number lanes[kLanes] = {};
            std::memcpy(lanes, from + start + i, left);
            put_all(lanes, round_lanes<mode>(call, numbers(lanes), words));
            std::memcpy(to + start + i, lanes, left);
        }
    }
}

template <Mode mode>
void round_all(const PintpotRounding& call) {
    const int64_t blocks = (call.count + kRandomBlock - 1) / kRandomBlock;
    const int64_t threads = useful_threads(call.threads, call.count, kCodesPerThread);
    with_type(call.dtype, call.output, [&](auto* to) {
        const auto* from = static_cast<const std::remove_pointer_t<decltype(to)>*>(call.input);
        pintpot::parallel_for(blocks, threads, [&](int64_t begin, int64_t end) {
            const int64_t last = end * kRandomBlock < call.count ? end * kRandomBlock : call.count;
            round_range<mode>(call, from, to, begin * kRandomBlock, last);
        });
    });
}

int round_to(const PintpotRounding& call) {
    switch (call.mode) {
        case kNearest: round_all<kNearest>(call); break;
        case kUp: round_all<kUp>(call); break;
        case kDown: round_all<kDown>(call); break;
        case kTowardZero: round_all<kTowardZero>(call); break;
        case kTiesToZero: round_all<kTiesToZero>(call); break;
        case kTiesAway: round_all<kTiesAway>(call); break;
        case kToOdd: round_all<kToOdd>(call); break;
        case kStochastic: round_all<kStochastic>(call); break;
        default: round_all<kEqual>(call);
    }
    return 0;
}

}  // namespace
