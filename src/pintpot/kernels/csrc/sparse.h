// Rows of blocks of which only some are kept: back to numbers, and times a few inputs.
//
// The bitmap of a row of blocks is packed as codes of one bit (packing.h): bit p of byte b says whether block
// b + p * bytes is kept, so that one bit of 64 neighbouring bytes tells of 64 neighbouring blocks. Numbers lie one block
// after the other, and where those of a row begin follows from the bits of the rows before.
//
// Single numbers (blocks of 1 x 1) are expanded to a dense row in the processor's cache, which is then multiplied.
// Larger blocks are multiplied where they lie, and what is not kept is never looked at; only an input that is not finite
// is multiplied by expanded rows, because zero times infinity is no zero.
#pragma once

#include "dots.h"

namespace {

// Single rows that are expanded together, so that each input is read once for all of them.
constexpr int64_t kExpandedRows = 4;

// Numbers of blocks that are multiplied before another row of them or another input is looked at.
constexpr int64_t kBlockNumbers = 4096;

constexpr int kDamaged = 2;

// Which of at most 64 blocks are kept, from one bit of as many bytes.
inline uint64_t bits_of(const uint8_t* from, int plane, int64_t count) {
#if defined(PINTPOT_AVX512)
    const __mmask64 these = count < 64 ? (1ull << count) - 1 : ~0ull;
    return _mm512_test_epi8_mask(_mm512_maskz_loadu_epi8(these, from), _mm512_set1_epi8(static_cast<char>(1 << plane)));
#else
    uint64_t found = 0;
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t word = 0;
        std::memcpy(&word, from + i, static_cast<size_t>(count - i < 8 ? count - i : 8));
        // The product moves the lowest bit of byte k to bit k of the highest byte.
        found |= ((((word >> plane) & spread(1)) * 0x0102040810204080u) >> 56) << i;
    }
    return found;
#endif
}

// Calls `visit(first block, blocks, their bits)` for all blocks of a row, in order.
template <typename Visit>
inline void each_word(const uint8_t* bitmap, int64_t columns, const Visit& visit) {
    const int64_t width = field_bytes(columns, 1);
    for (int plane = 0; plane < 8; ++plane) {
        const int64_t begin = plane * width, end = begin + width < columns ? begin + width : columns;
        for (int64_t i = begin; i < end; i += 64) {
            const int64_t count = end - i < 64 ? end - i : 64;
            visit(i, count, bits_of(bitmap + i - begin, plane, count));
        }
    }
}

// The columns of the kept blocks of a row; returns how many.
inline int64_t list_blocks(const uint8_t* bitmap, int64_t columns, int64_t* to) {
    int64_t count = 0;
    each_word(bitmap, columns, [&](int64_t column, int64_t, uint64_t bits) {
        for (; bits; bits &= bits - 1) to[count++] = column + __builtin_ctzll(bits);
    });
    return count;
}

#if defined(PINTPOT_AVX512)

// The first numbers of a vector at the lanes of a mask, and zeros.
inline Floats expanded(unsigned mask, Floats from) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), from);
}

#elif defined(PINTPOT_AVX2) || defined(PINTPOT_NEON)

// For each mask and lane, which number comes there; -1 for none.
struct Expansions {
    int8_t from[1 << kLanes][kLanes];

    constexpr Expansions() : from() {
        for (int mask = 0; mask < 1 << kLanes; ++mask) {
            int8_t next = 0;
            for (int lane = 0; lane < kLanes; ++lane) {
                from[mask][lane] = -1;
                if (mask >> lane & 1) from[mask][lane] = next++;
            }
        }
    }
};

constexpr Expansions kExpansions;

inline Floats expanded(unsigned mask, Floats from) {
#if defined(PINTPOT_AVX2)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpansions.from[mask]));
    const __m256i places = _mm256_cvtepi8_epi32(bytes);
    const __m256 moved = _mm256_permutevar8x32_ps(from, places);
    // Where the place is negative, its sign selects the zero.
    return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(places));
#else
    const int8x8_t bytes = vcreate_s8(load<uint32_t>(kExpansions.from[mask]));
    const uint32x4_t places = vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
    return reinterpret_cast<Floats>(vqtbl1q_u8(reinterpret_cast<uint8x16_t>(from), bytes_of(places)));
#endif
}

#else

inline Floats expanded(unsigned mask, Floats from) {
    Floats found = {};
    for (int lane = 0, next = 0; lane < kLanes; ++lane) {
        if (mask >> lane & 1) found[lane] = from[next++];
    }
    return found;
}

#endif

// A row of single numbers, dense. `end` is where the array of numbers ends.
template <typename Number, typename To>
inline void expand_row(const uint8_t* bitmap, int64_t columns, const Number* values, const Number* end, To* to) {
    each_word(bitmap, columns, [&](int64_t column, int64_t count, uint64_t bits) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            const unsigned mask = static_cast<unsigned>(bits >> i) & ((1u << kLanes) - 1);
            const int64_t left = end - values;
            put_all(to + column + i, expanded(mask, left >= kLanes ? numbers(values) : some(values, left)));
            values += __builtin_popcount(mask);
        }
        for (; i < count; ++i) {
            const bool kept = bits >> i & 1;
            put(to + column + i, kept ? number(*values) : 0.0f);
            values += kept;
        }
    });
}

template <typename Number, typename To>
inline void convert(const Number* from, int64_t count, To* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put_all(to + i, numbers(from + i));
    for (; i < count; ++i) put(to + i, number(from[i]));
}

// Row `row` of the blocks at their places in a dense row, and zeros.
template <typename Number, typename To>
inline void place_blocks(const Strip<Number>& blocks, int64_t row, int64_t columns, To* to) {
    std::memset(static_cast<void*>(to), 0, sizeof(To) * static_cast<size_t>(columns));
    for (int64_t b = 0; b < blocks.count; ++b) {
        const Number* from = blocks.weights + b * blocks.step + row * blocks.stride;
        convert(from, blocks.width, to + blocks.places[b] * blocks.width);
    }
}

// Where the numbers of each row of blocks begin.
struct Starts {
    Buffer<int64_t> blocks;  // (rows + 1,) before each row
    int64_t most = 0;        // in one row

    bool count(const PintpotSparse& weight, int64_t threads) {
        if (!blocks.reserve(weight.rows + 1)) return false;
        const int64_t bytes = field_bytes(weight.columns, 1);
        int64_t* to = blocks.get();
        to[0] = 0;
        threads = useful_threads(threads, weight.rows * bytes, kCodesPerThread);
        pintpot::parallel_for(weight.rows, threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) to[row + 1] = ones(weight.bitmap + row * bytes, bytes);
        });
        for (int64_t row = 0; row < weight.rows; ++row) {
            most = to[row + 1] > most ? to[row + 1] : most;
            to[row + 1] += to[row];
        }
        return true;
    }

    static int64_t ones(const uint8_t* from, int64_t bytes) {
        int64_t count = 0, i = 0;
        for (; i + 8 <= bytes; i += 8) count += __builtin_popcountll(load<uint64_t>(from + i));
        for (; i < bytes; ++i) count += __builtin_popcount(from[i]);
        return count;
    }
};

// A weight, and what all threads share of it.
struct SparseCall {
    const PintpotSparse& weight;
    Starts starts;
    Segments cut;  // of a row of the grid that holds the numbers
    int64_t block, in_features;

    explicit SparseCall(const PintpotSparse& given)
        : weight(given),
          cut(given.grid.packed ? given.grid.columns : 1, given.grid.packed ? given.grid.group : 1),
          block(given.block_rows * given.block_columns),
          in_features(given.columns * given.block_columns) {}

    int prepare(int64_t threads) {
        if (!cut.whole() || !starts.count(weight, threads)) return 1;
        return starts.blocks.get()[weight.rows] * block > weight.held ? kDamaged : 0;
    }
    const uint8_t* bitmap(int64_t row) const { return weight.bitmap + row * field_bytes(weight.columns, 1); }
};

// Buffers of one thread.
struct SparseScratch {
    Buffer<int64_t> columns;  // of the kept blocks of a row
    Buffer<float> rows;       // dense
    Buffer<float> unpacked;   // the numbers of a row of blocks, with what shares the rows of a grid with them
    Scratch groups;
    Buffer<Floats> sums;

    SparseScratch(const SparseCall& call, int64_t inputs)
        : columns(call.weight.columns),
          rows(kExpandedRows * call.in_features),
          unpacked(call.weight.grid.packed ? call.starts.most * call.block + 2 * call.cut.columns : 1),
          groups(1, call.cut.columns > call.cut.groups ? call.cut.columns : call.cut.groups, call.cut.groups),
          sums((call.block == 1 ? kExpandedRows : call.weight.block_rows) * inputs) {}
    bool whole() const {
        return columns.get() && rows.get() && unpacked.get() && groups.whole() && sums.get();
    }
};

// The numbers `begin` to `end` of those in a grid, which lie one row after the other. Whole rows are made numbers.
inline const float* read_grid(const SparseCall& call, const SparseScratch& scratch, int64_t begin, int64_t end) {
    const PintpotGrid& grid = call.weight.grid;
    const int64_t width = grid.columns, bytes = packed_bytes(width, grid.bits), first = begin / width;
    const Scratch& own = scratch.groups;
    for (int64_t row = first; row * width < end; ++row) {
        read_groups(grid, row, call.cut.groups, own.codes.get(), own.scale.get(), own.zero.get());
        unpack_row(grid.packed + row * bytes, grid.bits, width, own.codes.get());
        dequantize_row(call.cut, own.codes.get(), own.scale.get(), own.zero.get(),
                       scratch.unpacked.get() + (row - first) * width);
    }
    return scratch.unpacked.get() + begin - first * width;
}

// Calls `use(numbers, end of the array)` with the kept numbers of a row of blocks.
template <typename Use>
inline void with_values(const SparseCall& call, const SparseScratch& scratch, int64_t row, const Use& use) {
    const int64_t begin = call.starts.blocks.get()[row] * call.block;
    if (call.weight.grid.packed) {
        const int64_t end = call.starts.blocks.get()[row + 1] * call.block;
        const float* found = read_grid(call, scratch, begin, end);
        return use(found, found + end - begin);
    }
    with_type(call.weight.dtype, call.weight.values,
              [&](const auto* all) { use(all + begin, all + call.weight.held); });
}

// The kept blocks of a row of blocks.
template <typename Number>
inline Strip<Number> blocks_of(const SparseCall& call, const SparseScratch& scratch, int64_t row,
                               const Number* values) {
    const int64_t width = call.weight.block_columns;
    const int64_t count = list_blocks(call.bitmap(row), call.weight.columns, scratch.columns.get());
    return {values, width, call.block, scratch.columns.get(), count, width};
}

// Calls `give(row in the block, input, sum)` for a row of blocks.
template <typename Number, typename Give>
inline void multiply_blocks(const SparseCall& call, const SparseScratch& scratch, const Strip<Number>& blocks,
                            const FloatInputs& inputs, const Give& give) {
    const int64_t rows = call.weight.block_rows;
    const int64_t together = call.block < kBlockNumbers ? kBlockNumbers / call.block : 1;
    Floats* sums = scratch.sums.get();
    for (int64_t i = 0; i < rows * inputs.count; ++i) sums[i] = Floats{};
    for (int64_t b = 0; b < blocks.count; b += together) {
        Strip<Number> part = blocks;
        part.weights += b * blocks.step;
        part.places += b;
        part.count = blocks.count - b < together ? blocks.count - b : together;
        add_rows(part, rows, inputs.numbers.get(), inputs.count, inputs.columns, sums);
    }
    for (int64_t n = 0; n < inputs.count; ++n) {
        for (int64_t row = 0; row < rows; ++row) {
            Floats* own = sums + row * inputs.count + n;
            if (!inputs.finite.get()[n]) {
                place_blocks(blocks, row, call.in_features, scratch.rows.get());
                dot_rows(scratch.rows.get(), 1, inputs.columns, inputs.numbers.get() + n * inputs.columns, 1, own);
            }
            give(row, n, sum(*own));
        }
    }
}

// Calls `give(row, input, sum)` for some rows of single numbers.
template <typename Give>
inline void multiply_expanded(const SparseCall& call, const SparseScratch& scratch, int64_t begin, int64_t end,
                              const FloatInputs& inputs, const Give& give) {
    Floats* sums = scratch.sums.get();
    for (int64_t row = begin; row < end; row += kExpandedRows) {
        const int64_t rows = end - row < kExpandedRows ? end - row : kExpandedRows;
        for (int64_t r = 0; r < rows; ++r) {
            with_values(call, scratch, row + r, [&](const auto* values, const auto* last) {
                expand_row(call.bitmap(row + r), call.weight.columns, values, last,
                           scratch.rows.get() + r * call.in_features);
            });
        }
        dot_rows(scratch.rows.get(), rows, call.in_features, inputs.numbers.get(), inputs.count, sums);
        for (int64_t i = 0; i < rows * inputs.count; ++i) give(row + i / inputs.count, i % inputs.count, sum(sums[i]));
    }
}

int sparse_matmul(const PintpotSparseMatmul& given) {
    const PintpotSparse& weight = given.weight;
    SparseCall call(weight);
    FloatInputs inputs;
    if (const int failure = call.prepare(given.threads)) return failure;
    if (!inputs.read(given.dtype, given.input, given.count, call.in_features)) return 1;
    const int64_t out_features = weight.rows * weight.block_rows;
    const int64_t work = call.starts.blocks.get()[weight.rows] * call.block * given.count;
    const auto give = [&](int64_t row, int64_t n, float value) {
        put_at(given.dtype, given.output, n * out_features + row, value);
    };
    bool failed = false;
    pintpot::parallel_for(weight.rows, useful_threads(given.threads, work, kProductsPerThread),
                          [&](int64_t begin, int64_t end) {
        const SparseScratch scratch(call, given.count);
        if (!scratch.whole()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        if (call.block == 1) return multiply_expanded(call, scratch, begin, end, inputs, give);
        for (int64_t row = begin; row < end; ++row) {
            with_values(call, scratch, row, [&](const auto* values, const auto*) {
                multiply_blocks(call, scratch, blocks_of(call, scratch, row, values), inputs,
                                [&](int64_t part, int64_t n, float value) {
                                    give(row * weight.block_rows + part, n, value);
                                });
            });
        }
    });
    return failed ? 1 : 0;
}

int sparse_decode(const PintpotSparseDecode& given) {
    const PintpotSparse& weight = given.weight;
    SparseCall call(weight);
    if (const int failure = call.prepare(given.threads)) return failure;
    bool failed = false;
    const int64_t work = weight.rows * weight.block_rows * call.in_features;
    pintpot::parallel_for(weight.rows, useful_threads(given.threads, work, kCodesPerThread),
                          [&](int64_t begin, int64_t end) {
        const SparseScratch scratch(call, 1);
        if (!scratch.whole()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        for (int64_t row = begin; row < end; ++row) {
            with_values(call, scratch, row, [&](const auto* values, const auto* last) {
                with_type(given.dtype, given.output, [&](auto* all) {
                    auto* to = all + row * weight.block_rows * call.in_features;
                    if (call.block == 1) return expand_row(call.bitmap(row), weight.columns, values, last, to);
                    const auto blocks = blocks_of(call, scratch, row, values);
                    for (int64_t part = 0; part < weight.block_rows; ++part) {
                        place_blocks(blocks, part, call.in_features, to + part * call.in_features);
                    }
                });
            });
        }
    });
    return failed ? 1 : 0;
}

}  // namespace
