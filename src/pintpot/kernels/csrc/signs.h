// Signs with magnitudes of low rank: as a source of tiles (see tiles.h), and for rank one by their bits alone.
//
// Of rank one, y[row] = left[row] * sum of +-(right * x), where the sum takes one bit a column. Bits are planar (see
// packing.h): byte b holds the signs of the columns b, b + m, b + 2 m, ... of m bytes a row, and so the products
// right * x are laid out in eight planes, each filled up with zeros.
#pragma once

#include "tiles.h"

namespace {

class SignRankSource {
   public:
    explicit SignRankSource(const PintpotSignRank& from) : from_(from) {}

    bool prepare() {
        if (!right_.reserve(from_.rank * from_.columns)) return false;
        with_type(from_.dtype, from_.right, [&](const auto* all) {
            for (int64_t i = 0; i < from_.rank * from_.columns; ++i) right_.get()[i] = number(all[i]);
        });
        return true;
    }

    int64_t rows() const { return from_.rows; }
    int64_t columns() const { return from_.columns; }
    int64_t step() const { return 1; }
    const float* right() const { return right_.get(); }

    struct Scratch {
        Buffer<uint8_t> codes;
        Buffer<float> left;

        Scratch(const SignRankSource& source, int64_t columns)
            : codes(kTileRows * rounded_up(columns, kLanes)), left(kTileRows * source.from_.rank) {}
        bool whole() const { return codes.get() && left.get(); }
    };

    template <int Rows>
    void read(Scratch& scratch, int64_t row, int64_t begin, int64_t end, float* to, int64_t stride) const {
        const int64_t rank = from_.rank, columns = from_.columns, width = end - begin;
        float* left = scratch.left.get();
        uint8_t* codes = scratch.codes.get();
        with_type(from_.dtype, from_.left, [&](const auto* all) {
            for (int64_t k = 0; k < Rows * rank; ++k) left[k] = number(all[row * rank + k]);
        });
        unpack_part(from_.signs + row * packed_bytes(columns, 1), 1, columns, begin, end, codes, Rows);
        const float* right = right_.get() + begin;
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            Floats sizes[Rows];
            for (int r = 0; r < Rows; ++r) sizes[r] = left[r * rank] * load<Floats>(right + i);
            for (int64_t k = 1; k < rank; ++k) {
                const Floats factor = load<Floats>(right + k * columns + i);
                for (int r = 0; r < Rows; ++r) sizes[r] = fused(all(left[r * rank + k]), factor, sizes[r]);
            }
            for (int r = 0; r < Rows; ++r) {
                // One less than the code of a negative number has all bits set.
                const Words flip = (words_of_bytes(codes + r * width + i) - 1u) & 0x80000000u;
                store(to + r * stride + i, reinterpret_cast<Floats>(reinterpret_cast<Words>(sizes[r]) ^ flip));
            }
        }
        for (; i < width; ++i) {
            for (int r = 0; r < Rows; ++r) {
                float size = left[r * rank] * right[i];
                for (int64_t k = 1; k < rank; ++k) size += left[r * rank + k] * right[k * columns + i];
                to[r * stride + i] = codes[r * width + i] ? size : -size;
            }
        }
    }

   private:
    const PintpotSignRank& from_;
    Buffer<float> right_;
};

constexpr int64_t kPlanes = 8;

// right * x of the inputs, in planes of `width`; inputs that these sums cannot serve are `odd`.
struct SignedInputs {
    Buffer<float> products, totals;
    Buffer<uint8_t> odd;
    int64_t bytes, width;

    bool prepare(const PintpotSignRankCall& call, const float* right) {
        const int64_t columns = call.weight.columns, count = call.operand.count;
        bytes = packed_bytes(columns, 1);
        width = rounded_up(bytes, 64);
        if (!products.reserve(count * kPlanes * width) || !totals.reserve(count) || !odd.reserve(count)) return false;
        std::memset(products.get(), 0, sizeof(float) * static_cast<size_t>(count * kPlanes * width));
        with_type(call.operand.dtype, call.operand.input, [&](const auto* all) {
            for (int64_t i = 0; i < count; ++i) lay_out(all + i * columns, right, columns, i);
        });
        return true;
    }

    const float* of(int64_t input) const { return products.get() + input * kPlanes * width; }

   private:
    // Infinities cannot be taken away again, and what is near the ends of float32 might only fit with `left`.
    template <typename Number>
    void lay_out(const Number* x, const float* right, int64_t columns, int64_t input) {
        double total = 0;
        float most = 0;
        bool finite = true, zero = true;
        for (int64_t p = 0; p < kPlanes; ++p) {
            float* to = products.get() + (input * kPlanes + p) * width;
            for (int64_t c = p * bytes; c < columns && c < (p + 1) * bytes; ++c) {
                const float factor = number(x[c]), product = factor * right[c], size = std::fabs(product);
                finite &= size < kLargest;
                zero &= factor == 0;
                most = size > most ? size : most;
                total += product;
                *to++ = product;
            }
        }
        totals.get()[input] = static_cast<float>(total);
        odd.get()[input] = !finite || (most < kSmallest && !zero);
    }
};

// The sums of +-products of some rows.
template <int Rows>
inline void signed_sums(const uint8_t* signs, const SignedInputs& inputs, int64_t input, float* sums) {
    const int64_t bytes = inputs.bytes, width = inputs.width;
    const float* x = inputs.of(input);
    Floats totals[Rows] = {};
#if defined(PINTPOT_AVX512)
    // What has a set bit is added; twice that without the total is the sum with signs.
    for (int64_t b = 0; b < bytes; b += 64) {
        const __mmask64 some = bytes - b < 64 ? (1ull << (bytes - b)) - 1 : ~0ull;
        __m512i held[Rows];
        for (int r = 0; r < Rows; ++r) held[r] = _mm512_maskz_loadu_epi8(some, signs + r * bytes + b);
        for (int p = 0; p < kPlanes; ++p) {
            const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << p));
            __mmask64 set[Rows];
            for (int r = 0; r < Rows; ++r) set[r] = _mm512_test_epi8_mask(held[r], bit);
            for (int q = 0; q < 4; ++q) {
                const __m512 part = _mm512_loadu_ps(x + p * width + b + 16 * q);
                for (int r = 0; r < Rows; ++r) {
                    const auto lanes = static_cast<__mmask16>(set[r] >> 16 * q);
                    totals[r] = _mm512_mask_add_ps(totals[r], lanes, totals[r], part);
                }
            }
        }
    }
    for (int r = 0; r < Rows; ++r) sums[r] = 2 * sum(totals[r]) - inputs.totals.get()[input];
#else
    for (int64_t b = 0; b < bytes; b += kLanes) {
        Words held[Rows];
        for (int r = 0; r < Rows; ++r) {
            uint8_t last[kLanes] = {};
            const uint8_t* from = signs + r * bytes + b;
            if (bytes - b < kLanes) from = static_cast<uint8_t*>(std::memcpy(last, from, bytes - b));
            // Set bits are now those of negative numbers.
            held[r] = ~words_of_bytes(from);
        }
        for (int p = 0; p < kPlanes; ++p) {
            const Words part = load<Words>(x + p * width + b);
            for (int r = 0; r < Rows; ++r) {
                totals[r] += reinterpret_cast<Floats>(part ^ (held[r] << (31 - p) & 0x80000000u));
            }
        }
    }
    for (int r = 0; r < Rows; ++r) sums[r] = sum(totals[r]);
#endif
}

inline void multiply_signs(const PintpotSignRankCall& call, const SignedInputs& inputs, int64_t begin, int64_t end) {
    const PintpotOperand& operand = call.operand;
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = end - row < kTileRows ? 1 : kTileRows;
        for (int64_t i = 0; i < operand.count; ++i) {
            if (inputs.odd.get()[i]) continue;
            float sums[kTileRows];
            const auto add = rows == 1 ? signed_sums<1> : signed_sums<kTileRows>;
            add(call.weight.signs + row * inputs.bytes, inputs, i, sums);
            with_type(call.weight.dtype, call.weight.left, [&](const auto* left) {
                for (int64_t r = 0; r < rows; ++r) sums[r] *= number(left[row + r]);
            });
            with_type(operand.dtype, operand.output, [&](auto* all) {
                for (int64_t r = 0; r < rows; ++r) put(all + i * call.weight.rows + row + r, sums[r]);
            });
        }
    }
}

int sign_rank_matmul(const PintpotSignRankCall& call) {
    SignRankSource source(call.weight);
    if (!source.prepare()) return 1;
    if (call.weight.rank > 1) return multiply_source(source, call.operand);
    SignedInputs inputs;
    if (!inputs.prepare(call, source.right())) return 1;
    const int64_t rows = source.rows(), columns = source.columns();
    const int64_t threads = useful_threads(call.operand.threads, rows * columns, kLookedUpPerThread);
    pintpot::parallel_for(rows, threads,
                          [&](int64_t begin, int64_t end) { multiply_signs(call, inputs, begin, end); });
    int failed = 0;
    with_type(call.operand.dtype, call.operand.output, [&](auto* output) {
        const auto* input = static_cast<decltype(output)>(const_cast<void*>(call.operand.input));
        for (int64_t i = 0; i < call.operand.count; ++i) {
            if (!inputs.odd.get()[i]) continue;
            const PintpotOperand one = {input + i * columns, output + i * rows, call.operand.dtype, 1,
                                        call.operand.threads};
            failed |= multiply_source(source, one);
        }
    });
    return failed;
}

int sign_rank_decode(const PintpotSignRankCall& call) {
    SignRankSource source(call.weight);
    return source.prepare() ? decode_source(source, call.operand) : 1;
}

}  // namespace
