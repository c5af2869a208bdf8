// A product of two thin factors times a few inputs. The inner numbers stay in float32, in a buffer of the call: first
// all of them are computed, shared out by rows of the right factor, then all outputs, by rows of the left one.
#pragma once

#include "dots.h"

namespace {

// Calls `give(input, row, sum)` for each row of a dense matrix (rows, columns) and each input, from some threads. False
// where memory ran out.
template <typename Number, typename Give>
inline bool multiply_dense(const Number* matrix, int64_t rows, int64_t threads, const float* x, int64_t inputs,
                           int64_t columns, const Give& give) {
    bool whole = true;
    threads = useful_threads(threads, rows * columns * inputs, kProductsPerThread);
    pintpot::parallel_for(rows, threads, [&](int64_t begin, int64_t end) {
        Buffer<Floats> sums(kStripRows * inputs);
        if (!sums.get()) return __atomic_store_n(&whole, false, __ATOMIC_RELAXED);
        for (int64_t row = begin; row < end; row += kStripRows) {
            const int64_t down = end - row < kStripRows ? end - row : kStripRows;
            dot_rows(matrix + row * columns, down, columns, x, inputs, sums.get());
            for (int64_t i = 0; i < down * inputs; ++i) give(i % inputs, row + i / inputs, sum(sums.get()[i]));
        }
    });
    return whole;
}

int low_rank_matmul(const PintpotLowRankMatmul& call) {
    FloatInputs input;
    Buffer<float> inner(call.count * call.rank);
    if (!inner.get() || !input.read(call.dtype, call.input, call.count, call.columns)) return 1;
    bool whole = true;
    with_type(call.factor_dtype, call.right, [&](const auto* right) {
        const auto keep = [&](int64_t n, int64_t row, float value) { inner.get()[n * call.rank + row] = value; };
        whole = multiply_dense(right, call.rank, call.threads, input.numbers.get(), call.count, call.columns, keep);
    });
    with_type(call.factor_dtype, call.left, [&](const auto* left) {
        const auto give = [&](int64_t n, int64_t row, float value) {
            put_at(call.dtype, call.output, n * call.rows + row, value);
        };
        whole &= multiply_dense(left, call.rows, call.threads, inner.get(), call.count, call.rank, give);
    });
    return whole ? 0 : 1;
}

}  // namespace
