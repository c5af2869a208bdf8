// A product of two thin factors times a few inputs. The inner numbers stay in float32, in a buffer of the call: first
// all of them are computed, shared out by rows of the right factor, then all outputs, by rows of the left one.
#pragma once

#include "dots.h"

namespace {

// Calls `give(input, row, sum)` for each row of a dense matrix (rows, columns) and each input, from some threads.
template <typename Number, typename Give>
inline void multiply_dense(const Number* matrix, int64_t rows, int64_t threads, const float* x, int64_t inputs,
                           int64_t columns, const Give& give) {
    threads = useful_threads(threads, rows * columns * inputs, kProductsPerThread);
    pintpot::parallel_for(rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            dot_all(matrix + row * columns, x, inputs, columns, [&](int64_t n, float value) { give(n, row, value); });
        }
    });
}

int low_rank_matmul(const PintpotLowRankMatmul& call) {
    FloatInputs input;
    Buffer<float> inner(call.count * call.rank);
    if (!inner.get() || !input.read(call.dtype, call.input, call.count, call.columns)) return 1;
    with_type(call.factor_dtype, call.right, [&](const auto* right) {
        multiply_dense(right, call.rank, call.threads, input.numbers.get(), call.count, call.columns,
                       [&](int64_t n, int64_t row, float value) { inner.get()[n * call.rank + row] = value; });
    });
    with_type(call.factor_dtype, call.left, [&](const auto* left) {
        multiply_dense(left, call.rows, call.threads, inner.get(), call.count, call.rank,
                       [&](int64_t n, int64_t row, float value) {
                           put_at(call.dtype, call.output, n * call.rows + row, value);
                       });
    });
    return 0;
}

}  // namespace
