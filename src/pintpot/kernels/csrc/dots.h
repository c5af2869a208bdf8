// Rows of numbers times a few inputs: what the products of factors and of sparse weights share.
#pragma once

#include "grid.h"

namespace {

// As many as have their sums in registers together.
constexpr int64_t kInputsAtOnce = 4;

// The first `count` numbers of a vector, and zeros; nothing beyond them is read.
#if defined(PINTPOT_AVX512)
inline Floats some(const float* from, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}

template <typename Number>
inline Floats some(const Number* from, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
    return numbers(reinterpret_cast<const Number*>(&bits));
}
#else
template <typename Number>
inline Floats some(const Number* from, int64_t count) {
    Number part[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = from[i];
    return numbers(part);
}
#endif

inline bool all_finite(const float* from, int64_t count) {
    // Zero times what is not finite is NaN.
    Floats nothing = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) nothing += load<Floats>(from + i) * 0.0f;
    float rest = sum(nothing);
    for (; i < count; ++i) rest += from[i] * 0.0f;
    return rest == 0;
}

// The inputs of a call as floats.
struct FloatInputs {
    Buffer<float> numbers;  // (count, columns)
    Buffer<bool> finite;    // (count,)
    int64_t count = 0, columns = 0;

    bool read(int64_t dtype, const void* data, int64_t inputs, int64_t width) {
        count = inputs;
        columns = width;
        if (!numbers.reserve(count * columns) || !finite.reserve(count)) return false;
        for (int64_t n = 0; n < count; ++n) {
            float* own = numbers.get() + n * columns;
            with_type(dtype, data, [&](const auto* all) { scales_of(all + n * columns, columns, own); });
            finite.get()[n] = all_finite(own, columns);
        }
        return true;
    }
};

// The sums of a row of `count` weights with some inputs, each in two chains that take turns.
template <int Inputs, typename Number>
inline void dot_few(const Number* weights, const float* x, int64_t stride, int64_t count, float* to) {
    Floats even[Inputs] = {}, odd[Inputs] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        const Floats first = numbers(weights + i), second = numbers(weights + i + kLanes);
        for (int n = 0; n < Inputs; ++n) {
            even[n] = fused(first, load<Floats>(x + n * stride + i), even[n]);
            odd[n] = fused(second, load<Floats>(x + n * stride + i + kLanes), odd[n]);
        }
    }
    if (i + kLanes <= count) {
        const Floats first = numbers(weights + i);
        for (int n = 0; n < Inputs; ++n) even[n] = fused(first, load<Floats>(x + n * stride + i), even[n]);
        i += kLanes;
    }
    if (i < count) {
        const Floats last = some(weights + i, count - i);
        for (int n = 0; n < Inputs; ++n) odd[n] = fused(last, some(x + n * stride + i, count - i), odd[n]);
    }
    for (int n = 0; n < Inputs; ++n) to[n] = sum(even[n] + odd[n]);
}

// Calls `give(input, sum)` for the sums of a row of weights with all inputs (count, columns).
template <typename Number, typename Give>
inline void dot_all(const Number* weights, const float* x, int64_t inputs, int64_t columns, const Give& give) {
    float found[kInputsAtOnce];
    for (int64_t n = 0; n < inputs; n += kInputsAtOnce) {
        const float* own = x + n * columns;
        const int64_t together = inputs - n < kInputsAtOnce ? inputs - n : kInputsAtOnce;
        switch (together) {
            case 1: dot_few<1>(weights, own, columns, columns, found); break;
            case 2: dot_few<2>(weights, own, columns, columns, found); break;
            case 3: dot_few<3>(weights, own, columns, columns, found); break;
            default: dot_few<4>(weights, own, columns, columns, found);
        }
        for (int64_t i = 0; i < together; ++i) give(n + i, found[i]);
    }
}

// Writes one number of an output in its dtype.
inline void put_at(int64_t dtype, void* output, int64_t place, float value) {
    with_type(dtype, output, [&](auto* all) { put(all + place, value); });
}

}  // namespace
