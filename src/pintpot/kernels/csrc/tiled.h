// Tiles of kept numbers, each number with its place in its tile, times a few inputs.
//
// Numbers are taken in the order in which they are stored: y[row of its place] += number * x[column of its place]. Eight
// neighbours, which often belong to one row, are added to eight sums of that row, so that none waits for the one before.
// Inputs lie column by column, up to eight beside one another.
#pragma once

#include "dots.h"

namespace {

typedef float Eight __attribute__((vector_size(32)));

constexpr int64_t kTiledInputs = 8;
constexpr int64_t kTiledChains = 8;
constexpr int64_t kNumbersAtOnce = 256;

// Divides places below 2^15 by the width of a tile.
struct Division {
    uint32_t factor = 0, divisor;
    int shift = 15;

    explicit Division(int64_t by) : divisor(static_cast<uint32_t>(by)) {
        while ((1u << (shift - 15)) < divisor) ++shift;
        factor = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
    }
    uint32_t of(uint32_t place) const { return place * factor >> shift; }
};

// Some numbers of a tile with their rows and columns.
struct TilePart {
    float values[kNumbersAtOnce];
    uint32_t rows[kNumbersAtOnce], columns[kNumbersAtOnce];

    // False where a place is none of the tile.
    template <typename Number>
    bool read(const Number* from, const int16_t* places, int64_t count, const Division& width, uint32_t tile) {
        scales_of(from, count, values);
        bool sound = true;
        for (int64_t k = 0; k < count; ++k) {
            const uint32_t place = static_cast<uint16_t>(places[k]);
            sound &= place < tile;
            rows[k] = width.of(place);
            columns[k] = place - rows[k] * width.divisor;
        }
        return sound;
    }
};

// Adds products to the sums (tile_rows, kTiledChains). `x` begins at the tile's first column.
template <typename Lanes>
inline void add_part(const TilePart& part, int64_t count, const Lanes* x, Lanes* sums) {
    int64_t k = 0;
    for (; k + kTiledChains <= count; k += kTiledChains) {
        for (int64_t chain = 0; chain < kTiledChains; ++chain) {
            sums[part.rows[k + chain] * kTiledChains + chain] += part.values[k + chain] * x[part.columns[k + chain]];
        }
    }
    for (int64_t chain = 0; k < count; ++k, ++chain) {
        sums[part.rows[k] * kTiledChains + chain] += part.values[k] * x[part.columns[k]];
    }
}

// A row of tiles times the inputs in the lanes of `x` (columns, padded to tiles).
template <typename Number, typename Lanes>
inline bool multiply_tiles(const PintpotTiledMatmul& call, const Number* values, int64_t row, const Lanes* x,
                           Lanes* sums) {
    const int64_t across = (call.columns + call.tile_columns - 1) / call.tile_columns;
    const uint32_t tile = static_cast<uint32_t>(call.tile_rows * call.tile_columns);
    const Division width(call.tile_columns);
    TilePart part;
    for (int64_t i = 0; i < call.tile_rows * kTiledChains; ++i) sums[i] = Lanes{};
    for (int64_t t = 0; t < across; ++t) {
        const int64_t begin = call.starts[row * across + t], end = call.starts[row * across + t + 1];
        if (begin < 0 || begin > end || end > call.held) return false;
        for (int64_t k = begin; k < end; k += kNumbersAtOnce) {
            const int64_t count = end - k < kNumbersAtOnce ? end - k : kNumbersAtOnce;
            if (!part.read(values + k, call.places + k, count, width, tile)) return false;
            add_part(part, count, x + t * call.tile_columns, sums);
        }
    }
    return true;
}

// Makes a sum NaN where its row lacks a column whose input is not finite: a dense product has zero times it there.
// Places were read before, and are sound.
inline bool spread_nan(const PintpotTiledMatmul& call, int64_t row, const float* x, int64_t stride, float* to) {
    const int64_t across = (call.columns + call.tile_columns - 1) / call.tile_columns;
    const Division width(call.tile_columns);
    Buffer<int64_t> missing(call.tile_rows);
    if (!missing.get()) return false;
    int64_t odd = 0;
    for (int64_t i = 0; i < call.columns; ++i) odd += !std::isfinite(x[i]);
    for (int64_t i = 0; i < call.tile_rows; ++i) missing.get()[i] = odd;
    for (int64_t t = 0; t < across; ++t) {
        for (int64_t k = call.starts[row * across + t]; k < call.starts[row * across + t + 1]; ++k) {
            const uint32_t place = static_cast<uint16_t>(call.places[k]), at = width.of(place);
            const int64_t column = t * call.tile_columns + place - at * width.divisor;
            missing.get()[at] -= column < call.columns && !std::isfinite(x[column]);
        }
    }
    for (int64_t i = 0; i < call.tile_rows; ++i) {
        if (missing.get()[i] > 0) to[i * stride] = NAN;
    }
    return true;
}

// A row of tiles: writes the outputs of the inputs `first` and following, as many as `together`.
template <typename Lanes>
int put_tiles(const PintpotTiledMatmul& call, const FloatInputs& inputs, int64_t first, int64_t together, int64_t row,
              const Lanes* x, Lanes* sums) {
    bool sound = false;
    with_type(call.value_dtype, call.values,
              [&](const auto* values) { sound = multiply_tiles(call, values, row, x, sums); });
    if (!sound) return kDamaged;
    const int64_t stride = sizeof(Lanes) / 4 * kTiledChains;
    for (int64_t i = 0; i < call.tile_rows; ++i) {
        Lanes* own = sums + i * kTiledChains;
        own[0] = ((own[0] + own[1]) + (own[2] + own[3])) + ((own[4] + own[5]) + (own[6] + own[7]));
    }
    for (int64_t n = 0; n < together; ++n) {
        float* own = reinterpret_cast<float*>(sums) + n;
        if (!inputs.finite.get()[first + n] &&
            !spread_nan(call, row, inputs.numbers.get() + (first + n) * call.columns, stride, own)) {
            return 1;
        }
        for (int64_t i = 0; i < call.tile_rows && row * call.tile_rows + i < call.rows; ++i) {
            put_at(call.dtype, call.output, (first + n) * call.rows + row * call.tile_rows + i, own[i * stride]);
        }
    }
    return 0;
}

// The inputs `first` and following, as many as `Lanes` has.
template <typename Lanes>
int multiply_lanes(const PintpotTiledMatmul& call, const FloatInputs& inputs, int64_t first) {
    const int64_t lanes = sizeof(Lanes) / 4, left = call.count - first, together = left < lanes ? left : lanes;
    const int64_t across = (call.columns + call.tile_columns - 1) / call.tile_columns;
    const int64_t down = (call.rows + call.tile_rows - 1) / call.tile_rows;
    Buffer<Lanes> x(across * call.tile_columns);
    if (!x.get()) return 1;
    for (int64_t i = 0; i < across * call.tile_columns; ++i) {
        x.get()[i] = Lanes{};
        float* to = reinterpret_cast<float*>(x.get() + i);
        for (int64_t n = 0; n < together && i < call.columns; ++n) {
            to[n] = inputs.numbers.get()[(first + n) * call.columns + i];
        }
    }
    int status = 0;
    const int64_t threads = useful_threads(call.threads, call.held * together, kProductsPerThread / 4);
    pintpot::parallel_for(down, threads, [&](int64_t begin, int64_t end) {
        Buffer<Lanes> sums(call.tile_rows * kTiledChains);
        int own = sums.get() ? 0 : 1;
        for (int64_t row = begin; row < end && own == 0; ++row) {
            own = put_tiles(call, inputs, first, together, row, x.get(), sums.get());
        }
        if (own) __atomic_store_n(&status, own, __ATOMIC_RELAXED);
    });
    return status;
}

int tiled_matmul(const PintpotTiledMatmul& call) {
    FloatInputs inputs;
    if (!inputs.read(call.dtype, call.input, call.count, call.columns)) return 1;
    int status = 0;
    for (int64_t first = 0; first < call.count && status == 0; first += kTiledInputs) {
        const bool alone = call.count - first == 1;
        status = alone ? multiply_lanes<float>(call, inputs, first) : multiply_lanes<Eight>(call, inputs, first);
    }
    return status;
}

}  // namespace
