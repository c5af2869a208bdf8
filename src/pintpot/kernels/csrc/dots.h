// Rows of numbers times a few inputs: what the products of factors and of sparse weights share.
#pragma once

#include "grid.h"

namespace {

// As many rows and inputs as have their sums in registers together.
#if defined(PINTPOT_AVX512)
constexpr int64_t kStripRows = 4;
#else
constexpr int64_t kStripRows = 2;
#endif
constexpr int64_t kStripInputs = 4;

// As many numbers of a row as are multiplied before another row or input is looked at.
constexpr int64_t kStripColumns = 1024;

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

// Some rows of weights: in each the same pieces of `width` numbers, each of which has its place in the input.
template <typename Number>
struct Strip {
    const Number* weights;
    int64_t stride;         // from row to row
    int64_t step;           // from piece to piece
    const int64_t* places;  // of each piece, in widths
    int64_t count, width;
};

// Adds the products of some rows with some inputs, `stride` apart, to their sums (Rows, across).
template <int Rows, int Inputs, typename Number>
void add_strip(const Strip<Number>& strip, const float* x, int64_t stride, Floats* sums, int64_t across) {
    Floats totals[Rows][Inputs];
    for (int r = 0; r < Rows; ++r) {
        for (int n = 0; n < Inputs; ++n) totals[r][n] = sums[r * across + n];
    }
    const int64_t whole = strip.width / kLanes * kLanes, rest = strip.width - whole;
    for (int64_t piece = 0; piece < strip.count; ++piece) {
        const Number* weights = strip.weights + piece * strip.step;
        const float* own = x + strip.places[piece] * strip.width;
        for (int64_t i = 0; i < whole; i += kLanes) {
            Floats part[Inputs];
            for (int n = 0; n < Inputs; ++n) part[n] = load<Floats>(own + n * stride + i);
            for (int r = 0; r < Rows; ++r) {
                const Floats row = numbers(weights + r * strip.stride + i);
                for (int n = 0; n < Inputs; ++n) totals[r][n] = fused(row, part[n], totals[r][n]);
            }
        }
        for (int r = 0; r < Rows && rest > 0; ++r) {
            const Floats row = some(weights + r * strip.stride + whole, rest);
            for (int n = 0; n < Inputs; ++n) {
                totals[r][n] = fused(row, some(own + n * stride + whole, rest), totals[r][n]);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        for (int n = 0; n < Inputs; ++n) sums[r * across + n] = totals[r][n];
    }
}

template <typename Number>
using AddStrip = void (*)(const Strip<Number>&, const float*, int64_t, Floats*, int64_t);

template <typename Number, int Rows>
AddStrip<Number> add_strip_of(int64_t inputs) {
    constexpr AddStrip<Number> choice[] = {add_strip<Rows, 1, Number>, add_strip<Rows, 2, Number>,
                                           add_strip<Rows, 3, Number>, add_strip<Rows, 4, Number>};
    return choice[inputs - 1];
}

template <typename Number>
AddStrip<Number> add_strip_of(int64_t rows, int64_t inputs) {
    if (rows == 1) return add_strip_of<Number, 1>(inputs);
    if (kStripRows == 2 || rows == 2) return add_strip_of<Number, 2>(inputs);
    return rows == 3 ? add_strip_of<Number, 3>(inputs) : add_strip_of<Number, kStripRows>(inputs);
}

// Adds the products of all `rows` of a strip with all inputs to their sums (rows, inputs).
template <typename Number>
inline void add_rows(Strip<Number> strip, int64_t rows, const float* x, int64_t inputs, int64_t stride, Floats* sums) {
    for (int64_t row = 0; row < rows; row += kStripRows, strip.weights += kStripRows * strip.stride) {
        const int64_t down = rows - row < kStripRows ? rows - row : kStripRows;
        for (int64_t n = 0; n < inputs; n += kStripInputs) {
            const int64_t across = inputs - n < kStripInputs ? inputs - n : kStripInputs;
            add_strip_of<Number>(down, across)(strip, x + n * stride, stride, sums + row * inputs + n, inputs);
        }
    }
}

// The sums (rows, inputs) of dense rows with inputs (inputs, columns).
template <typename Number>
inline void dot_rows(const Number* matrix, int64_t rows, int64_t columns, const float* x, int64_t inputs,
                     Floats* sums) {
    const int64_t place = 0;
    for (int64_t i = 0; i < rows * inputs; ++i) sums[i] = Floats{};
    for (int64_t begin = 0; begin < columns; begin += kStripColumns) {
        const int64_t width = columns - begin < kStripColumns ? columns - begin : kStripColumns;
        add_rows(Strip<Number>{matrix + begin, columns, 0, &place, 1, width}, rows, x + begin, inputs, columns, sums);
    }
}

// Writes one number of an output in its dtype.
inline void put_at(int64_t dtype, void* output, int64_t place, float value) {
    with_type(dtype, output, [&](auto* all) { put(all + place, value); });
}

}  // namespace
