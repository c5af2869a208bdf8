// The fast Walsh-Hadamard transform of hadamard.py. Sums are taken in the order of the definition.
#pragma once

#include <type_traits>

#include "fixed_point.h"
#include "packing.h"
#include "parallel.h"
#include "pintpot.h"
#include "simd.h"

namespace {

// The lanes of a vector, each in the place of the one `half` away.
template <int half>
inline Floats exchanged(Floats x) {
#if defined(__GNUC__) && !defined(__clang__)
    Ints order = {};
    for (int i = 0; i < kLanes; ++i) order[i] = i ^ half;
    return __builtin_shuffle(x, order);
#else
    Floats y = {};
    for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ half];
    return y;
#endif
}

// One step within vectors: of two lanes `half` apart the first becomes their sum, the second the first less the second.
template <int half>
inline Floats mixed_lanes(Floats x) {
    Words sign = {};
    for (int i = 0; i < kLanes; ++i) sign[i] = i & half ? 0x80000000u : 0u;
    return exchanged<half>(x) + reinterpret_cast<Floats>(reinterpret_cast<Words>(x) ^ sign);
}

inline Floats mixed_within(Floats x, int64_t block) {
    if (block > 1) x = mixed_lanes<1>(x);
    if (block > 2) x = mixed_lanes<2>(x);
    if constexpr (kLanes > 4) {
        if (block > 4) x = mixed_lanes<4>(x);
    }
    if constexpr (kLanes > 8) {
        if (block > 8) x = mixed_lanes<8>(x);
    }
    return x;
}

// Two steps at once: of numbers `half` apart, then of the results twice as far apart.
inline void mix_four(float* numbers, int64_t half) {
    for (float* at = numbers; at < numbers + half; at += kLanes) {
        const Floats a = load<Floats>(at), b = load<Floats>(at + half);
        const Floats c = load<Floats>(at + 2 * half), d = load<Floats>(at + 3 * half);
        const Floats ab = a + b, cd = c + d, less_ab = a - b, less_cd = c - d;
        store(at, ab + cd);
        store(at + half, less_ab + less_cd);
        store(at + 2 * half, ab - cd);
        store(at + 3 * half, less_ab - less_cd);
    }
}

// The steps of blocks in which whole vectors are mixed, of numbers `half` apart and more.
inline void mix_vectors(float* numbers, int64_t count, int64_t half, int64_t block) {
    for (; 2 * half < block; half *= 4) {
        for (int64_t start = 0; start < count; start += 4 * half) mix_four(numbers + start, half);
    }
    for (int64_t start = 0; half < block && start < count; start += 2 * half) {
        for (int64_t i = start; i < start + half; i += kLanes) {
            const Floats first = load<Floats>(numbers + i), second = load<Floats>(numbers + i + half);
            store(numbers + i, first + second);
            store(numbers + i + half, first - second);
        }
    }
}

// Blocks of `count` numbers, in place; `count` is a multiple of the block and of kLanes.
inline void mix(float* numbers, int64_t count, int64_t block) {
    for (int64_t i = 0; i < count; i += kLanes) store(numbers + i, mixed_within(load<Floats>(numbers + i), block));
    mix_vectors(numbers, count, kLanes, block);
}

// Numbers that are transformed together: whole blocks, as many as stay in the processor's first cache.
constexpr int64_t kMixedAtOnce = 2048;

template <typename Number>
bool mix_range(const PintpotHadamard& call, const Number* from, Number* to, int64_t begin, int64_t end, int64_t most) {
    // Small blocks may fill their last vector in part.
    Buffer<float> scratch(most + kLanes);
    if (!scratch.get()) return false;
    float* held = scratch.get();
    for (int64_t start = begin; start < end; start += most) {
        const int64_t count = end - start < most ? end - start : most, whole = count / kLanes * kLanes;
        for (int64_t i = 0; i < whole; i += kLanes) store(held + i, ::numbers(from + start + i) * call.scale);
        for (int64_t i = whole; i < count; ++i) held[i] = number(from[start + i]) * call.scale;
        const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = count; i < padded; ++i) held[i] = 0;
        mix(held, padded, call.block);
        for (int64_t i = 0; i < whole; i += kLanes) put_all(to + start + i, load<Floats>(held + i));
        for (int64_t i = whole; i < count; ++i) put(to + start + i, held[i]);
    }
    return true;
}

int hadamard(const PintpotHadamard& call) {
    const int64_t most = call.block > kMixedAtOnce ? call.block : kMixedAtOnce, parts = (call.count + most - 1) / most;
    const int64_t threads = useful_threads(call.threads, call.count, kCodesPerThread);
    bool failed = false;
    with_type(call.dtype, call.output, [&](auto* to) {
        const auto* from = static_cast<const std::remove_pointer_t<decltype(to)>*>(call.input);
        pintpot::parallel_for(parts, threads, [&](int64_t begin, int64_t end) {
            const int64_t last = end * most < call.count ? end * most : call.count;
            if (!mix_range(call, from, to, begin * most, last, most)) {
                __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            }
        });
    });
    return failed ? 1 : 0;
}

}  // namespace
