// Products with grids whose codes lie in tiles of 16 rows (see row_tiles.py): a lane of a vector is a row, so that sums
// are never added across lanes, and scales are read as vectors.
#pragma once

#include "grid.h"

namespace {

constexpr int64_t kLaneRows = 16, kBlockColumns = 32, kVectorBytes = 64;
// A lane has the whole sum of a segment, so that fewer columns fit into 32 bits than where it has a 16th.
constexpr int64_t kWidestSegment = 128;

inline int64_t blocks_of(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

// The codes of a block, row after row. Eight words of a vector hold four columns of two rows each.
inline void unpack_block(const uint8_t* from, int64_t bits, uint8_t* codes) {
    std::memset(codes, 0, kLaneRows * kBlockColumns);
    each_field(bits, 8, [&](int field, int shift, int64_t first) {
        const int each = 8 / field;
        for (int64_t quad = 0; quad < kBlockColumns / 4; ++quad) {
            const uint8_t* vector = from + (first + quad / each) * kVectorBytes;
            const int right = static_cast<int>(quad % each) * field;
            for (int64_t i = 0; i < 8; ++i) {
                const uint64_t word = field_of(load<uint64_t>(vector + 8 * i), right, spread((1 << field) - 1), shift);
                uint8_t* to = codes + 2 * i * kBlockColumns + 4 * quad;
                store(to, load<uint32_t>(to) | static_cast<uint32_t>(word));
                store(to + kBlockColumns, load<uint32_t>(to + kBlockColumns) | static_cast<uint32_t>(word >> 32));
            }
        }
    });
}

// Where the scales of a tile's rows in a group begin. The last tile may have fewer rows.
inline int64_t scales_at(const PintpotGrid& grid, int64_t tile, int64_t group) {
    const int64_t first = tile * kLaneRows, left = grid.rows - first;
    return first * ((grid.columns + grid.group - 1) / grid.group) + group * (left < kLaneRows ? left : kLaneRows);
}

// The scale and the zero of a row and a group.
inline void row_scale(const PintpotGrid& grid, int64_t group, int64_t row, float* scale, float* zero) {
    const int64_t at = scales_at(grid, row / kLaneRows, group) + row % kLaneRows;
    with_type(grid.scale_dtype, grid.scale, [&](const auto* all) { *scale = number(all[at]); });
    *zero = grid.zero ? grid.zero[at] : static_cast<float>(1 << (grid.bits - 1));
}

// One tile times one input in float32, for inputs that fixed point cannot hold and processors without its products.
inline void multiply_block_rows(const PintpotGrid& grid, int64_t tile, const float* x, float* sums) {
    alignas(64) uint8_t codes[kLaneRows * kBlockColumns];
    const int64_t blocks = blocks_of(grid.columns), first = tile * kLaneRows;
    const int64_t rows = grid.rows - first < kLaneRows ? grid.rows - first : kLaneRows;
    for (int64_t r = 0; r < kLaneRows; ++r) sums[r] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * kBlockColumns;
        const int64_t count = grid.columns - start < kBlockColumns ? grid.columns - start : kBlockColumns;
        unpack_block(grid.packed + (tile * blocks + block) * grid.bits * kVectorBytes, grid.bits, codes);
        for (int64_t r = 0; r < rows; ++r) {
            float scale, zero;
            row_scale(grid, start / grid.group, first + r, &scale, &zero);
            sums[r] += scale * dot_floats(codes + r * kBlockColumns, zero, x + start, count);
        }
    }
}

#if defined(PINTPOT_AVX512)

constexpr bool kRowsInLanes = true;

// Adds the products of some blocks with one field of `Width` bits to the sums of each plane and tile.
template <int Width, int Planes, int Tiles>
inline void add_field(const uint8_t* from, int64_t apart, int64_t stride, int64_t blocks, const Plane* x,
                      int64_t x_stride, __m512i (&sums)[Planes][Tiles]) {
    const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << Width) - 1));
    for (int64_t block = 0; block < blocks; ++block, from += stride, x += kBlockColumns) {
        for (int v = 0; v < Width; ++v) {
            __m512i held[Tiles];
            for (int t = 0; t < Tiles; ++t) held[t] = _mm512_loadu_si512(from + t * apart + v * kVectorBytes);
            for (int k = 0; k < 8 / Width; ++k) {
                __m512i codes[Tiles];
                for (int t = 0; t < Tiles; ++t) {
                    codes[t] = Width == 8 ? held[t] : _mm512_and_si512(_mm512_srli_epi16(held[t], Width * k), mask);
                }
                for (int p = 0; p < Planes; ++p) {
                    const Plane* quad = x + p * x_stride + 4 * (v * (8 / Width) + k);
                    const __m512i four = _mm512_set1_epi32(load<int32_t>(quad));
                    for (int t = 0; t < Tiles; ++t) sums[p][t] = dot(sums[p][t], codes[t], four);
                }
            }
        }
    }
}

// The sums of a segment of whole blocks: of each plane and tile.
template <int Planes, int Tiles>
inline void add_segment(const PintpotGrid& grid, const uint8_t* from, int64_t apart, int64_t blocks, const Plane* x,
                        int64_t x_stride, __m512i (&sums)[Planes][Tiles]) {
    const int64_t stride = grid.bits * kVectorBytes;
    each_field(grid.bits, 8, [&](int field, int shift, int64_t vector) {
        __m512i own[Planes][Tiles];
        for (int p = 0; p < Planes; ++p) {
            for (int t = 0; t < Tiles; ++t) own[p][t] = _mm512_setzero_si512();
        }
        const uint8_t* at = from + vector * kVectorBytes;
        if (field == 8) add_field<8, Planes, Tiles>(at, apart, stride, blocks, x, x_stride, own);
        if (field == 4) add_field<4, Planes, Tiles>(at, apart, stride, blocks, x, x_stride, own);
        if (field == 2) add_field<2, Planes, Tiles>(at, apart, stride, blocks, x, x_stride, own);
        if (field == 1) add_field<1, Planes, Tiles>(at, apart, stride, blocks, x, x_stride, own);
        for (int p = 0; p < Planes; ++p) {
            for (int t = 0; t < Tiles; ++t) {
                sums[p][t] = _mm512_add_epi32(sums[p][t], _mm512_sll_epi32(own[p][t], _mm_cvtsi32_si128(shift)));
            }
        }
    });
}

// 16 numbers of a row of `count`, of which the last ones may not be there.
template <typename Number>
inline Floats lanes_of(const Number* from, int64_t count) {
    if (count >= kLanes) return numbers(from);
    Number some[kLanes] = {};
    std::memcpy(some, from, sizeof(Number) * static_cast<size_t>(count));
    return numbers(some);
}

inline Floats lanes_of(const uint8_t* from, int64_t count) {
    if (count >= kLanes) return floats_of_bytes(from);
    uint8_t some[kLanes] = {};
    std::memcpy(some, from, static_cast<size_t>(count));
    return floats_of_bytes(some);
}

// Some tiles times one input in fixed point.
template <int Planes, int Tiles, typename Number>
void multiply_lanes(const PintpotGrid& grid, const Number* scale, const Segments& cut, const Input& input,
                    int64_t stride, int64_t tile, float* totals) {
    const int64_t blocks = blocks_of(grid.columns), apart = blocks * grid.bits * kVectorBytes;
    const uint8_t* from = grid.packed + tile * apart;
    Floats found[Tiles] = {};
    int64_t first[Tiles], left[Tiles];
    for (int t = 0; t < Tiles; ++t) {
        first[t] = scales_at(grid, tile + t, 0);
        left[t] = grid.rows - (tile + t) * kLaneRows;
    }
    for (int64_t s = 0; s < cut.count; ++s) {
        const Segment& segment = cut[s];
        __m512i sums[Planes][Tiles] = {};
        add_segment<Planes, Tiles>(grid, from + segment.start / kBlockColumns * grid.bits * kVectorBytes, apart,
                                   blocks_of(segment.end - segment.start), input.planes + segment.start, stride, sums);
        const bool last = s + 1 == cut.count || cut[s + 1].group != segment.group;
        for (int t = 0; t < Tiles; ++t) {
            // At most 128 products of 255 * 127, so that 8 bits more fit too.
            __m512i high = sums[0][t];
            if (Planes > 1) high = _mm512_add_epi32(_mm512_slli_epi32(high, 8), sums[Planes > 1][t]);
            Floats value = _mm512_cvtepi32_ps(high);
            if (Planes > 2) value = fused(value, all(256.0f), _mm512_cvtepi32_ps(sums[Planes - 1][t]));
            const int64_t at = first[t] + segment.group * (left[t] < kLaneRows ? left[t] : kLaneRows);
            const Floats step = lanes_of(scale + at, left[t]);
            found[t] = fused(value * input.steps[s], step, found[t]);
            if (!last) continue;
            const Floats middle = all(static_cast<float>(1 << (grid.bits - 1)));
            const Floats zero = grid.zero ? lanes_of(grid.zero + at, left[t]) : middle;
            found[t] = fused(step * zero, all(-input.sums[segment.group]), found[t]);
        }
    }
    for (int t = 0; t < Tiles; ++t) store(totals + t * kLaneRows, found[t]);
}

template <int Tiles>
inline void multiply_lanes(const PintpotGrid& grid, int planes, const Segments& cut, const Input& input, int64_t stride,
                           int64_t tile, float* totals) {
    with_type(grid.scale_dtype, grid.scale, [&](const auto* scale) {
        if (planes == 1) multiply_lanes<1, Tiles>(grid, scale, cut, input, stride, tile, totals);
        if (planes == 2) multiply_lanes<2, Tiles>(grid, scale, cut, input, stride, tile, totals);
        if (planes == 3) multiply_lanes<3, Tiles>(grid, scale, cut, input, stride, tile, totals);
    });
}

#else

constexpr bool kRowsInLanes = false;

template <int Tiles>
inline void multiply_lanes(const PintpotGrid&, int, const Segments&, const Input&, int64_t, int64_t, float*) {}

#endif

constexpr int64_t kTilesAtOnce = 2;

// Writes some tiles' products with one input, of which `found` has 16 numbers a tile.
inline void put_tiles(const PintpotGridMatmul& call, int64_t input, int64_t tile, int64_t tiles, const float* found) {
    const int64_t first = tile * kLaneRows, rows = call.grid.rows - first;
    const int64_t count = rows < tiles * kLaneRows ? rows : tiles * kLaneRows;
    with_type(call.dtype, call.output, [&](auto* all) {
        for (int64_t r = 0; r < count; ++r) put(all + input * call.grid.rows + first + r, found[r]);
    });
}

int row_tiles_matmul(const PintpotGridMatmul& call) {
    const PintpotGrid& grid = call.grid;
    const Segments cut(grid.columns, grid.group, kWidestSegment);
    const int64_t stride = blocks_of(grid.columns) * kBlockColumns, tiles = (grid.rows + kLaneRows - 1) / kLaneRows;
    const int planes = kRowsInLanes ? planes_of(call.dtype, call.digits) : 0;
    Buffer<float> floats(call.count * stride), steps(call.count * cut.count), sums(call.count * cut.groups);
    Buffer<Plane> fixed(call.count * stride * (planes + 1));
    Buffer<Input> inputs(call.count);
    if (!cut.whole() || !floats.get() || !steps.get() || !sums.get() || !fixed.get() || !inputs.get()) return 1;
    std::memset(fixed.get(), 0, sizeof(Plane) * static_cast<size_t>(call.count * stride * planes));
    for (int64_t i = 0; i < call.count; ++i) {
        float *own = floats.get() + i * stride, *step = steps.get() + i * cut.count, *sum = sums.get() + i * cut.groups;
        with_type(call.dtype, call.input, [&](const auto* all) {
            scales_of(all + i * grid.columns, grid.columns, own);
        });
        Plane* plane = fixed.get() + i * stride * planes;
        inputs.get()[i] = {own, plane, step, sum, planes > 0 && fix_input(cut, own, planes, plane, stride, step, sum)};
    }
    const int64_t items = (tiles + kTilesAtOnce - 1) / kTilesAtOnce, work = grid.rows * grid.columns * call.count;
    const int64_t threads = useful_threads(call.threads, work, kProductsPerThread);
    pintpot::parallel_for(items, threads, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t tile = item * kTilesAtOnce, some = tiles - tile < kTilesAtOnce ? tiles - tile : kTilesAtOnce;
            for (int64_t i = 0; i < call.count; ++i) {
                const Input& input = inputs.get()[i];
                alignas(64) float found[kTilesAtOnce * kLaneRows];
                if (!input.fixed) {
                    for (int64_t t = 0; t < some; ++t) {
                        multiply_block_rows(grid, tile + t, input.numbers, found + t * kLaneRows);
                    }
                } else if (some == kTilesAtOnce) {
                    multiply_lanes<kTilesAtOnce>(grid, planes, cut, input, stride, tile, found);
                } else {
                    multiply_lanes<1>(grid, planes, cut, input, stride, tile, found);
                }
                put_tiles(call, i, tile, some, found);
            }
        }
    });
    return 0;
}

int row_tiles_dequantize(const PintpotGridDequantize& call) {
    const PintpotGrid& grid = call.grid;
    const int64_t blocks = blocks_of(grid.columns), tiles = (grid.rows + kLaneRows - 1) / kLaneRows;
    const int64_t threads = useful_threads(call.threads, grid.rows * grid.columns, kCodesPerThread);
    pintpot::parallel_for(tiles, threads, [&](int64_t begin, int64_t end) {
        alignas(64) uint8_t codes[kLaneRows * kBlockColumns];
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kLaneRows;
            const int64_t rows = grid.rows - first < kLaneRows ? grid.rows - first : kLaneRows;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t start = block * kBlockColumns;
                const int64_t stop = start + kBlockColumns < grid.columns ? start + kBlockColumns : grid.columns;
                unpack_block(grid.packed + (tile * blocks + block) * grid.bits * kVectorBytes, grid.bits, codes);
                for (int64_t r = 0; r < rows; ++r) {
                    float scale, zero;
                    row_scale(grid, start / grid.group, first + r, &scale, &zero);
                    with_type(call.dtype, call.output, [&](auto* to) {
                        round_scales(&scale, 1, to);
                        dequantize_part(start, stop, codes + r * kBlockColumns, scale, zero,
                                        to + (first + r) * grid.columns);
                    });
                }
            }
        }
    });
    return 0;
}

}  // namespace
