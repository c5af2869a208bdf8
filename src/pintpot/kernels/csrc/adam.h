// AdamW on packed moments: each block of a moment is unpacked, moved on and packed again while it is in the cache.
//
// The order of operations and roundings is that of torch's fused AdamW on float32 moments, between the `read` and the
// `write_` of `optim/_states.py`.
#pragma once

#include "parallel.h"
#include "pintpot.h"
#include "simd.h"

namespace {

constexpr int64_t kMostBlock = 1024;


// `count` numbers of a block, the rest up to `padded` zeros.
inline void unpack_moment(const PintpotMoment& from, int64_t bits, int64_t start, int64_t count, int64_t padded,
                          float scale, float* to) {
    const float* levels = from.levels;
    if (bits == 8) {
        const uint8_t* codes = from.codes + start;
        for (int64_t i = 0; i < count; ++i) to[i] = levels[codes[i]];
    } else {
        const uint8_t* codes = from.codes + start / 2;
        // The two numbers of a byte lie together in the table. An odd count reads one too many, which becomes 0 below.
        for (int64_t i = 0; i < (count + 1) / 2; ++i) std::memcpy(to + 2 * i, levels + 2 * codes[i], 8);
    }
    for (int64_t i = count; i < padded; ++i) to[i] = 0;
    for (int64_t i = 0; i < padded; i += kLanes) store(to + i, load<Floats>(to + i) * scale);
}

// Packs `count` numbers, and gives their scale: the greatest magnitude, or NaN where one is.
inline float pack_moment(const PintpotMoment& into, int64_t bits, int64_t start, int64_t count, int64_t padded,
                         const float* from) {
    Floats most = {};
    Ints odd = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats size = magnitude(load<Floats>(from + i));
        most = size > most ? size : most;
        odd |= size != size;
    }
    float scale = greatest(most);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (odd[lane]) scale = NAN;
    }
    const Floats divisor = all(scale < 1.17549435e-38f ? 1.17549435e-38f : scale);
    alignas(64) uint16_t places[kMostBlock];
    for (int64_t i = 0; i < padded; i += kLanes) store(places + i, bfloat16_bits(load<Floats>(from + i) / divisor));
    // Bytes may be anything to the compiler, also the pointers themselves: it must see that these do not change.
    const uint8_t* __restrict table = into.table;
    if (bits == 8) {
        uint8_t* __restrict codes = into.codes + start;
        for (int64_t i = 0; i < count; ++i) codes[i] = table[places[i]];
    } else {
        uint8_t* __restrict codes = into.codes + start / 2;
        const int64_t pairs = count / 2;
        for (int64_t i = 0; i < pairs; ++i) {
            codes[i] = static_cast<uint8_t>(table[places[2 * i]] | (table[places[2 * i + 1]] << 4));
        }
        if (count % 2) codes[pairs] = table[places[count - 1]];
    }
    return scale;
}

// The rates of one step, in float32 as torch rounds them.
struct AdamRates {
    float decay, weight1, beta2, weight2, root2, eps, rate, alpha;
    bool decays;
};

// Moves moments on, and leaves in `direction` what the parameter is to be moved by (before `rate`).
inline void move_moments(const AdamRates& rates, int64_t padded, const float* gradient, float* first, float* second,
                         float* parameter) {
    const bool near = std::fabs(rates.weight1) < 0.5f;
    const Floats weight = all(near ? rates.weight1 : rates.weight1 - 1);
    for (int64_t i = 0; i < padded; i += kLanes) {
        const Floats g = load<Floats>(gradient + i);
        Floats m = load<Floats>(first + i), v = load<Floats>(second + i), p = load<Floats>(parameter + i);
        if (rates.decays) p = p * rates.decay;
        m = fused(weight, g - m, near ? m : g);
        v = fused(g * rates.weight2, g, v * rates.beta2);
        const Floats below = square_root(v) / rates.root2 + rates.eps;
        p = p + m * rates.rate / below;
        store(first + i, m);
        store(second + i, v);
        store(parameter + i, p);
    }
}

template <typename Number>
inline void read_all(const Number* from, int64_t count, int64_t padded, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, numbers(from + i));
    for (; i < count; ++i) to[i] = number(from[i]);
    for (; i < padded; ++i) to[i] = 0;
}

inline void write_parameter(float* to, const float* from, int64_t count, const AdamRates&) {
    std::memcpy(to, from, static_cast<size_t>(count) * 4);
}

// A narrow parameter: `from` is the direction. Decay and move are each rounded, as two operations on the tensor are.
template <typename Number>
inline void write_parameter(Number* to, const float* from, int64_t count, const AdamRates& rates) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i < kLanes ? count - i : kLanes;
        Number lanes[kLanes] = {};
        std::memcpy(lanes, to + i, sizeof(Number) * static_cast<size_t>(left));
        if (rates.decays) put_all(lanes, numbers(lanes) * rates.decay);
        put_all(lanes, fused(all(rates.alpha), load<Floats>(from + i), numbers(lanes)));
        std::memcpy(to + i, lanes, sizeof(Number) * static_cast<size_t>(left));
    }
}

template <typename Number, typename Gradient>
void adam_blocks(const PintpotAdam& call, Number* parameter, const Gradient* gradient, int64_t begin, int64_t end) {
    constexpr bool narrow = sizeof(Number) == 2;
    AdamRates rates = {};
    rates.decays = call.weight_decay != 0;
    rates.decay = static_cast<float>(1 - call.lr * call.weight_decay);
    rates.weight1 = static_cast<float>(1 - call.beta1);
    rates.beta2 = static_cast<float>(call.beta2);
    rates.weight2 = static_cast<float>(1 - call.beta2);
    rates.root2 = static_cast<float>(std::sqrt(1 - std::pow(call.beta2, static_cast<double>(call.step))));
    rates.eps = static_cast<float>(call.eps);
    const double correction = 1 - std::pow(call.beta1, static_cast<double>(call.step));
    rates.rate = static_cast<float>(narrow ? 1 / correction : -call.lr / correction);
    rates.alpha = static_cast<float>(-call.lr);
    AdamRates inner = rates;
    inner.decays = rates.decays && !narrow;
    alignas(64) float p[kMostBlock], g[kMostBlock], m[kMostBlock], v[kMostBlock];
    for (int64_t block = begin; block < end; ++block) {
        const int64_t start = block * call.block;
        const int64_t count = call.numel - start < call.block ? call.numel - start : call.block;
        const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
        unpack_moment(call.first, call.bits, start, count, padded, call.first.scales[block], m);
        unpack_moment(call.second, call.bits, start, count, padded, call.second.scales[block], v);
        read_all(gradient + start, count, padded, g);
        if (narrow) {
            std::memset(p, 0, static_cast<size_t>(padded) * 4);
        } else {
            read_all(parameter + start, count, padded, p);
        }
        move_moments(inner, padded, g, m, v, p);
        write_parameter(parameter + start, p, count, rates);
        call.first.scales[block] = pack_moment(call.first, call.bits, start, count, padded, m);
        call.second.scales[block] = pack_moment(call.second, call.bits, start, count, padded, v);
    }
}

int adam(const PintpotAdam& call) {
    const int64_t blocks = (call.numel + call.block - 1) / call.block;
    with_type(call.parameter_dtype, call.parameter, [&](auto* parameter) {
        with_type(call.gradient_dtype, call.gradient, [&](const auto* gradient) {
            pintpot::parallel_for(blocks, call.threads, [&](int64_t begin, int64_t end) {
                adam_blocks(call, parameter, gradient, begin, end);
            });
        });
    });
    return 0;
}

}  // namespace
