// Weights that are made numbers a tile at a time: back to numbers, and times a few inputs.
//
// A tile is some columns of a few rows, in float32, which stays in the processor's first cache until all inputs have
// been multiplied with it. How a tile is read is the business of a source, which has
//
//     rows(), columns()                       of the weight
//     step()                                  tiles begin at multiples of it
//     Scratch(source, columns), whole()       buffers of one thread for tiles of at most so many columns
//     read<Rows>(scratch, row, begin, end, to, stride)
//         the numbers of one row or of kTileRows; may spoil up to kOverhang floats after the last of each
#pragma once

#include "fixed_point.h"
#include "packing.h"

namespace {

constexpr int64_t kTileColumns = 1024;
// The fewest of a transposed product, whose threads share out the tiles.
constexpr int64_t kFewestColumns = 256;
constexpr int64_t kTileRows = 4;
constexpr int64_t kOverhang = 8;
constexpr int64_t kLookedUpPerThread = 1 << 16;

inline int64_t rounded_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// The tiles of a row: `count` of `width` columns, the last with fewer.
struct Tiling {
    int64_t columns, width, padded, count;

    Tiling(int64_t columns, int64_t step, int64_t most) : columns(columns) {
        width = most < step ? step : most / step * step;
        if (width > columns) width = columns;
        padded = rounded_up(width, kLanes);
        count = (columns + width - 1) / width;
    }
    int64_t begin(int64_t tile) const { return tile * width; }
    int64_t end(int64_t tile) const { return (tile + 1) * width < columns ? (tile + 1) * width : columns; }
};

// Inputs as floats, each row in tiles that are filled up with zeros.
struct TiledInputs {
    Buffer<float> numbers;

    bool prepare(const PintpotOperand& operand, const Tiling& tiling) {
        const int64_t row = tiling.count * tiling.padded;
        if (!numbers.reserve(operand.count * row)) return false;
        std::memset(numbers.get(), 0, sizeof(float) * static_cast<size_t>(operand.count * row));
        with_type(operand.dtype, operand.input, [&](const auto* all) {
            for (int64_t i = 0; i < operand.count; ++i) {
                for (int64_t t = 0; t < tiling.count; ++t) {
                    float* to = numbers.get() + i * row + t * tiling.padded;
                    const auto* from = all + i * tiling.columns;
                    for (int64_t c = tiling.begin(t); c < tiling.end(t); ++c) *to++ = number(from[c]);
                }
            }
        });
        return true;
    }
};

// The tile of one thread: kTileRows rows, `stride` apart, with zeros after the last column.
template <typename Source>
struct Tile {
    typename Source::Scratch scratch;
    Buffer<float> numbers;
    int64_t stride;

    Tile(const Source& source, const Tiling& tiling)
        : scratch(source, tiling.width), stride(rounded_up(tiling.width + kOverhang, kLanes)) {
        if (numbers.reserve(kTileRows * stride)) clear(0);
    }
    bool whole() const { return numbers.get() && scratch.whole(); }
    float* row(int64_t r) const { return numbers.get() + r * stride; }

    // Zeros from row `first` on.
    void clear(int64_t first) {
        std::memset(row(first), 0, sizeof(float) * static_cast<size_t>((kTileRows - first) * stride));
    }

    void read(const Source& source, int64_t first, int64_t rows, int64_t begin, int64_t end) {
        if (rows == kTileRows) source.template read<kTileRows>(scratch, first, begin, end, row(0), stride);
        for (int64_t r = 0; r < rows; ++r) {
            if (rows < kTileRows) source.template read<1>(scratch, first + r, begin, end, row(r), stride);
            float* rest = row(r) + end - begin;
            std::memset(rest, 0, sizeof(float) * static_cast<size_t>(row(r) + stride - rest));
        }
    }
};

// Adds the products of a tile with some inputs to their sums: (kTileRows,) for each input.
template <int Inputs>
inline void add_tile(const float* tile, int64_t tile_stride, const float* x, int64_t x_stride, int64_t count,
                     Floats* sums) {
    Floats totals[Inputs][kTileRows];
    for (int i = 0; i < Inputs; ++i) {
        for (int r = 0; r < kTileRows; ++r) totals[i][r] = sums[i * kTileRows + r];
    }
    for (int64_t c = 0; c < count; c += kLanes) {
        Floats weights[kTileRows];
        for (int r = 0; r < kTileRows; ++r) weights[r] = load<Floats>(tile + r * tile_stride + c);
        for (int i = 0; i < Inputs; ++i) {
            const Floats factor = load<Floats>(x + i * x_stride + c);
            for (int r = 0; r < kTileRows; ++r) totals[i][r] = fused(weights[r], factor, totals[i][r]);
        }
    }
    for (int i = 0; i < Inputs; ++i) {
        for (int r = 0; r < kTileRows; ++r) sums[i * kTileRows + r] = totals[i][r];
    }
}

// The rows `begin` to `end` times all inputs. Where fewer than kTileRows are left, the tile's other rows are what was
// there before, and their sums are dropped.
template <typename Source>
bool multiply_tiles(const Source& source, const PintpotOperand& operand, const Tiling& tiling,
                    const TiledInputs& inputs, int64_t begin, int64_t end) {
    Tile<Source> tile(source, tiling);
    Buffer<Floats> sums(operand.count * kTileRows);
    if (!tile.whole() || !sums.get()) return false;
    const int64_t x_stride = tiling.count * tiling.padded;
    for (int64_t row = begin; row < end; row += kTileRows) {
        const int64_t rows = end - row < kTileRows ? end - row : kTileRows;
        for (int64_t i = 0; i < operand.count * kTileRows; ++i) sums.get()[i] = Floats{};
        for (int64_t t = 0; t < tiling.count; ++t) {
            tile.read(source, row, rows, tiling.begin(t), tiling.end(t));
            const int64_t width = rounded_up(tiling.end(t) - tiling.begin(t), kLanes);
            for (int64_t i = 0; i < operand.count; i += 2) {
                const float* x = inputs.numbers.get() + i * x_stride + t * tiling.padded;
                const auto add = i + 1 < operand.count ? add_tile<2> : add_tile<1>;
                add(tile.row(0), tile.stride, x, x_stride, width, sums.get() + i * kTileRows);
            }
        }
        with_type(operand.dtype, operand.output, [&](auto* all) {
            for (int64_t i = 0; i < operand.count; ++i) {
                auto* to = all + i * source.rows() + row;
                for (int64_t r = 0; r < rows; ++r) put(to + r, sum(sums.get()[i * kTileRows + r]));
            }
        });
    }
    return true;
}

// Runs `work(begin, end)` for ranges of `items`; 1 where one of them found no memory.
template <typename Work>
inline int share(int64_t items, int64_t threads, const Work& work) {
    bool failed = false;
    pintpot::parallel_for(items, threads, [&](int64_t begin, int64_t end) {
        if (!work(begin, end)) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
    });
    return failed ? 1 : 0;
}

// input (count, columns) times the transposed weight: output (count, rows).
template <typename Source>
int multiply_source(const Source& source, const PintpotOperand& operand) {
    const Tiling tiling(source.columns(), source.step(), kTileColumns);
    TiledInputs inputs;
    if (!inputs.prepare(operand, tiling)) return 1;
    const int64_t threads = useful_threads(operand.threads, source.rows() * source.columns(), kLookedUpPerThread);
    return share(source.rows(), threads, [&](int64_t begin, int64_t end) {
        return multiply_tiles(source, operand, tiling, inputs, begin, end);
    });
}

// Adds the products of a tile with the numbers that one input has for its rows to the input's sums (columns,).
inline void add_rows(const float* tile, int64_t stride, const float* x, int64_t count, float* sums) {
    static_assert(kTileRows == 4, "one factor a row");
    const Floats factors[kTileRows] = {all(x[0]), all(x[1]), all(x[2]), all(x[3])};
    for (int64_t c = 0; c < count; c += kLanes) {
        Floats total = load<Floats>(sums + c);
        for (int r = 0; r < kTileRows; ++r) total = fused(load<Floats>(tile + r * stride + c), factors[r], total);
        store(sums + c, total);
    }
}

template <typename Source>
bool multiply_columns(const Source& source, const PintpotOperand& operand, const Tiling& tiling, const float* x,
                      int64_t t) {
    const int64_t rows = source.rows(), x_stride = rounded_up(rows, kTileRows);
    const int64_t begin = tiling.begin(t), width = tiling.end(t) - begin;
    Tile<Source> tile(source, tiling);
    Buffer<float> sums(operand.count * tiling.padded);
    if (!tile.whole() || !sums.get()) return false;
    std::memset(sums.get(), 0, sizeof(float) * static_cast<size_t>(operand.count * tiling.padded));
    for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t some = rows - row < kTileRows ? rows - row : kTileRows;
        tile.read(source, row, some, begin, tiling.end(t));
        // What is zero in the input must meet no infinity of an earlier tile.
        if (some < kTileRows) tile.clear(some);
        for (int64_t i = 0; i < operand.count; ++i) {
            add_rows(tile.row(0), tile.stride, x + i * x_stride + row, rounded_up(width, kLanes),
                     sums.get() + i * tiling.padded);
        }
    }
    with_type(operand.dtype, operand.output, [&](auto* all) {
        for (int64_t i = 0; i < operand.count; ++i) {
            for (int64_t c = 0; c < width; ++c) {
                put(all + i * tiling.columns + begin + c, sums.get()[i * tiling.padded + c]);
            }
        }
    });
    return true;
}

// input (count, rows) times the weight: output (count, columns).
template <typename Source>
int multiply_transposed(const Source& source, const PintpotOperand& operand) {
    const int64_t rows = source.rows(), columns = source.columns();
    const int64_t threads = useful_threads(operand.threads, rows * columns, kLookedUpPerThread);
    // A column is the sum over the rows in their order, whichever tile it is in.
    int64_t most = columns / threads / 2;
    most = most < kFewestColumns ? kFewestColumns : (most > kTileColumns ? kTileColumns : most);
    const Tiling tiling(columns, source.step(), most);
    const int64_t x_stride = rounded_up(rows, kTileRows);
    Buffer<float> x(operand.count * x_stride);
    if (!x.get()) return 1;
    std::memset(x.get(), 0, sizeof(float) * static_cast<size_t>(operand.count * x_stride));
    with_type(operand.dtype, operand.input, [&](const auto* all) {
        for (int64_t i = 0; i < operand.count * rows; ++i) x.get()[i / rows * x_stride + i % rows] = number(all[i]);
    });
    return share(tiling.count, threads, [&](int64_t begin, int64_t end) {
        bool whole = true;
        for (int64_t t = begin; t < end; ++t) whole &= multiply_columns(source, operand, tiling, x.get(), t);
        return whole;
    });
}

template <typename Number>
inline void put_row(const float* from, int64_t count, Number* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put_all(to + i, load<Floats>(from + i));
    for (; i < count; ++i) put(to + i, from[i]);
}

// The weight itself: output (rows, columns).
template <typename Source>
int decode_source(const Source& source, const PintpotOperand& operand) {
    const Tiling tiling(source.columns(), source.step(), kTileColumns);
    const int64_t threads = useful_threads(operand.threads, source.rows() * tiling.columns, kCodesPerThread);
    return share(source.rows(), threads, [&](int64_t begin, int64_t end) {
        Tile<Source> tile(source, tiling);
        if (!tile.whole()) return false;
        for (int64_t row = begin; row < end; ++row) {
            for (int64_t t = 0; t < tiling.count; ++t) {
                const int64_t first = tiling.begin(t), count = tiling.end(t) - first;
                source.template read<1>(tile.scratch, row, first, first + count, tile.row(0), tile.stride);
                with_type(operand.dtype, operand.output, [&](auto* all) {
                    put_row(tile.row(0), count, all + row * tiling.columns + first);
                });
            }
        }
        return true;
    });
}

// Floats as a dtype holds them.
inline void round_floats(float* numbers, int64_t count, int64_t dtype) {
    if (dtype == kFloat32) return;
    for (int64_t i = 0; i < count; ++i) {
        if (dtype == kBFloat16) {
            BFloat16 rounded;
            put(&rounded, numbers[i]);
            numbers[i] = number(rounded);
        } else {
            Float16 rounded;
            put(&rounded, numbers[i]);
            numbers[i] = number(rounded);
        }
    }
}

}  // namespace
