// Products with codes of 1 to 4 bits that are stored as bit planes (lookup.py), by looking sums of inputs up.
//
// Four bits of one plane of a row, of four neighbouring columns, are the number of one of 16 sums of four inputs, each
// taken with its sign (+ for a bit of 1). The sums of all quads of a segment of at most kTableColumns columns are
// written once for all rows, as bytes relative to the largest possible one. A shuffle then finds the sums of 16 rows.
//
//     y[row] = sum over segments of scale[row, group] * step[segment] / 2 * sum over planes of 2^plane * entry
//              + sum over groups of scale[row, group] * ((2^bits - 1) / 2 - zero[row, group]) * (sum x)
//
// Entries are stored 128 higher than they are, so that sums of bytes need no signs.
#pragma once

#include <cfloat>

#include "grid.h"

namespace {

constexpr int64_t kLookedUpRows = 32, kQuad = 4, kEntries = 16, kTableColumns = 64;
constexpr int kBias = 128, kMostEntry = 127;

inline int64_t quads_of(int64_t columns) { return (columns + kQuad - 1) / kQuad; }

// Quads of a row: groups begin new ones.
inline int64_t quads_of(const PintpotGrid& grid, int64_t groups) {
    return (groups - 1) * quads_of(grid.group) + quads_of(grid.columns - (groups - 1) * grid.group);
}

inline int64_t first_quad(const PintpotGrid& grid, const Segment& segment) {
    return segment.group * quads_of(grid.group) + (segment.start - segment.group * grid.group) / kQuad;
}

// The signs of each input in the 16 sums of a quad.
constexpr float kSigns[kQuad][kEntries] = {{-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1},
                                           {-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1},
                                           {-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1},
                                           {-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1}};

inline void write_table(const float* x, float inverse, uint8_t* table) {
    // Adding it to a number of less than 2^22 rounds that to an integer, ties to even, in the lowest bits of the sum.
    const Floats shift = all(12582912.0f);
    for (int64_t e = 0; e < kEntries; e += kLanes) {
        Floats sum = load<Floats>(kSigns[0] + e) * x[0];
        for (int64_t i = 1; i < kQuad; ++i) sum = sum + load<Floats>(kSigns[i] + e) * x[i];
        const Words whole = reinterpret_cast<Words>(sum * inverse + shift) - reinterpret_cast<Words>(shift) + kBias;
        store(table + e, __builtin_convertvector(whole, Bytes));
    }
}

// Writes the tables of a segment; gives their step. It is not a number where an input is none, or sums overflow.
inline float write_tables(const float* from, int64_t count, uint8_t* tables) {
    float x[kTableColumns] = {};
    std::memcpy(x, from, sizeof(float) * static_cast<size_t>(count));
    const int64_t quads = quads_of(count);
    float most = 0;
    bool finite = true;
    for (int64_t q = 0; q < quads; ++q) {
        const float* four = x + kQuad * q;
        const float size = std::fabs(four[0]) + std::fabs(four[1]) + std::fabs(four[2]) + std::fabs(four[3]);
        finite &= size <= FLT_MAX;
        most = size > most ? size : most;
    }
    const bool held = finite && most >= kSmallest;
    if (!held) std::memset(tables, kBias, static_cast<size_t>(quads * kEntries));
    for (int64_t q = 0; q < quads && held; ++q) write_table(x + kQuad * q, kMostEntry / most, tables + kEntries * q);
    if (!finite) return NAN;
    return held ? most / kMostEntry : 0.0f;
}

// Sums over planes and quads of 2^plane times the entries that 32 rows look up; at most 16 quads, so that they are
// below 2^16. The planes of a row lie `stride` bytes apart.
#if defined(PINTPOT_AVX512)

inline void look_up(const uint8_t* planes, int64_t stride, int64_t bits, const uint8_t* tables, int64_t quads,
                    uint16_t* totals) {
    const __m512i low = _mm512_set1_epi8(15);
    // Sums of 16 bits: of pairs of bytes as they are, and of their upper bytes alone.
    __m512i pairs[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, upper[2] = {pairs[0], pairs[0]};
    for (int64_t plane = bits - 1; plane >= 0; --plane) {
        for (int half = 0; half < 2; ++half) {
            pairs[half] = _mm512_add_epi16(pairs[half], pairs[half]);
            upper[half] = _mm512_add_epi16(upper[half], upper[half]);
        }
        for (int64_t q = 0; q < quads; q += 4) {
            const __mmask64 some = quads - q >= 4 ? ~0ull : (1ull << (kEntries * (quads - q))) - 1;
            const __m512i codes = _mm512_maskz_loadu_epi8(some, planes + plane * stride + kEntries * q);
            const __m512i table = _mm512_maskz_loadu_epi8(some, tables + kEntries * q);
            const __m512i found[2] = {
                _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low)),
                _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low))};
            for (int half = 0; half < 2; ++half) {
                pairs[half] = _mm512_add_epi16(pairs[half], found[half]);
                upper[half] = _mm512_add_epi16(upper[half], _mm512_srli_epi16(found[half], 8));
            }
        }
    }
    for (int half = 0; half < 2; ++half) {
        const __m512i even = _mm512_sub_epi16(pairs[half], _mm512_slli_epi16(upper[half], 8));
        const __m512i parts[2] = {_mm512_unpacklo_epi16(even, upper[half]), _mm512_unpackhi_epi16(even, upper[half])};
        for (int part = 0; part < 2; ++part) {
            const __m256i two = _mm256_add_epi16(_mm512_castsi512_si256(parts[part]),
                                                 _mm512_extracti64x4_epi64(parts[part], 1));
            store(totals + 16 * half + 8 * part,
                  _mm_add_epi16(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
        }
    }
}

#elif defined(PINTPOT_AVX2)

inline void look_up(const uint8_t* planes, int64_t stride, int64_t bits, const uint8_t* tables, int64_t quads,
                    uint16_t* totals) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i pairs[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, upper[2] = {pairs[0], pairs[0]};
    const auto take = [](const uint8_t* from, bool both) {
        return both ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                    : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    };
    for (int64_t plane = bits - 1; plane >= 0; --plane) {
        for (int half = 0; half < 2; ++half) {
            pairs[half] = _mm256_add_epi16(pairs[half], pairs[half]);
            upper[half] = _mm256_add_epi16(upper[half], upper[half]);
        }
        for (int64_t q = 0; q < quads; q += 2) {
            const __m256i codes = take(planes + plane * stride + kEntries * q, quads - q >= 2);
            const __m256i table = take(tables + kEntries * q, quads - q >= 2);
            const __m256i found[2] = {
                _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low)),
                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(codes, 4), low))};
            for (int half = 0; half < 2; ++half) {
                pairs[half] = _mm256_add_epi16(pairs[half], found[half]);
                upper[half] = _mm256_add_epi16(upper[half], _mm256_srli_epi16(found[half], 8));
            }
        }
    }
    for (int half = 0; half < 2; ++half) {
        const __m256i even = _mm256_sub_epi16(pairs[half], _mm256_slli_epi16(upper[half], 8));
        const __m256i parts[2] = {_mm256_unpacklo_epi16(even, upper[half]), _mm256_unpackhi_epi16(even, upper[half])};
        for (int part = 0; part < 2; ++part) {
            store(totals + 16 * half + 8 * part,
                  _mm_add_epi16(_mm256_castsi256_si128(parts[part]), _mm256_extracti128_si256(parts[part], 1)));
        }
    }
}

#elif defined(PINTPOT_NEON)

inline void look_up(const uint8_t* planes, int64_t stride, int64_t bits, const uint8_t* tables, int64_t quads,
                    uint16_t* totals) {
    uint16x8_t sums[kLookedUpRows / 8] = {};
    for (int64_t plane = bits - 1; plane >= 0; --plane) {
        for (uint16x8_t& sum : sums) sum = vaddq_u16(sum, sum);
        for (int64_t q = 0; q < quads; ++q) {
            const uint8x16_t codes = vld1q_u8(planes + plane * stride + kEntries * q);
            const uint8x16_t table = vld1q_u8(tables + kEntries * q);
            const uint8x16_t found[2] = {vqtbl1q_u8(table, vandq_u8(codes, vdupq_n_u8(15))),
                                         vqtbl1q_u8(table, vshrq_n_u8(codes, 4))};
            for (int half = 0; half < 2; ++half) {
                sums[2 * half] = vaddw_u8(sums[2 * half], vget_low_u8(found[half]));
                sums[2 * half + 1] = vaddw_high_u8(sums[2 * half + 1], found[half]);
            }
        }
    }
    for (int i = 0; i < kLookedUpRows / 8; ++i) store(totals + 8 * i, sums[i]);
}

#else

inline void look_up(const uint8_t* planes, int64_t stride, int64_t bits, const uint8_t* tables, int64_t quads,
                    uint16_t* totals) {
    uint32_t sums[kLookedUpRows] = {};
    for (int64_t plane = bits - 1; plane >= 0; --plane) {
        for (int64_t row = 0; row < kLookedUpRows; ++row) sums[row] *= 2;
        for (int64_t q = 0; q < quads; ++q) {
            const uint8_t* codes = planes + plane * stride + kEntries * q;
            const uint8_t* table = tables + kEntries * q;
            for (int64_t row = 0; row < kLookedUpRows / 2; ++row) {
                sums[row] += table[codes[row] & 15];
                sums[row + kLookedUpRows / 2] += table[codes[row] >> 4];
            }
        }
    }
    for (int64_t row = 0; row < kLookedUpRows; ++row) totals[row] = static_cast<uint16_t>(sums[row]);
}

#endif

// The tables of all inputs of a call, written once for all rows.
struct Tables {
    Buffer<float> numbers, steps, sums;
    Buffer<uint8_t> entries;

    bool prepare(const PintpotGridMatmul& call, const Segments& cut, int64_t quads) {
        const PintpotGrid& grid = call.grid;
        if (!numbers.reserve(grid.columns) || !steps.reserve(call.count * cut.count) ||
            !sums.reserve(call.count * cut.groups) || !entries.reserve(call.count * quads * kEntries)) {
            return false;
        }
        for (int64_t i = 0; i < call.count; ++i) {
            const float* own = numbers.get();
            with_type(call.dtype, call.input, [&](const auto* all) {
                scales_of(all + i * grid.columns, grid.columns, numbers.get());
            });
            double total = 0;
            for (int64_t s = 0; s < cut.count; ++s) {
                const Segment& segment = cut[s];
                if (s == 0 || cut[s - 1].group != segment.group) total = 0;
                for (int64_t column = segment.start; column < segment.end; ++column) total += own[column];
                sums.get()[i * cut.groups + segment.group] = static_cast<float>(total);
                steps.get()[i * cut.count + s] =
                    write_tables(own + segment.start, segment.end - segment.start,
                                 entries.get() + (i * quads + first_quad(grid, segment)) * kEntries);
            }
        }
        return true;
    }
};

// What a thread needs of 32 rows: scales, and what a group's sum is multiplied by, for each group; sums of each input.
struct LookedUp {
    Buffer<float> row, scale, shift, sums;
    Buffer<uint8_t> codes;

    LookedUp(int64_t groups, int64_t count)
        : row(2 * groups),
          scale(groups * kLookedUpRows),
          shift(groups * kLookedUpRows),
          sums(count * kLookedUpRows),
          codes(groups) {}
    bool whole() const { return row.get() && scale.get() && shift.get() && sums.get() && codes.get(); }

    void read(const PintpotGrid& grid, int64_t first, int64_t rows, int64_t groups) {
        const float middle = static_cast<float>((1 << grid.bits) - 1) / 2;
        float* zero = row.get() + groups;
        for (int64_t r = 0; r < kLookedUpRows; ++r) {
            if (r < rows) read_groups(grid, first + r, groups, codes.get(), row.get(), zero);
            for (int64_t g = 0; g < groups; ++g) {
                scale.get()[g * kLookedUpRows + r] = r < rows ? row.get()[g] : 0.0f;
                shift.get()[g * kLookedUpRows + r] = r < rows ? row.get()[g] * (middle - zero[g]) : 0.0f;
            }
        }
    }
};

// sums += weights * factor for 32 rows.
inline void add_rows(float* sums, const float* weights, float factor) {
    for (int64_t r = 0; r < kLookedUpRows; r += kLanes) {
        store(sums + r, fused(load<Floats>(weights + r), all(factor), load<Floats>(sums + r)));
    }
}

// 32 rows times all inputs.
inline void multiply_tile(const PintpotGridMatmul& call, const Segments& cut, const Tables& tables, int64_t quads,
                          int64_t index, const LookedUp& tile) {
    const int64_t bits = call.grid.bits, stride = quads * kEntries;
    const uint8_t* planes = call.grid.packed + index * bits * stride;
    float* sums = tile.sums.get();
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(call.count * kLookedUpRows));
    for (int64_t s = 0; s < cut.count; ++s) {
        const Segment& segment = cut[s];
        const int64_t here = quads_of(segment.end - segment.start), first = first_quad(call.grid, segment);
        const float* scale = tile.scale.get() + segment.group * kLookedUpRows;
        const float bias = static_cast<float>(kBias * here * ((1 << bits) - 1));
        for (int64_t i = 0; i < call.count; ++i) {
            alignas(64) uint16_t totals[kLookedUpRows];
            const uint8_t* entries = tables.entries.get() + (i * quads + first) * kEntries;
            look_up(planes + first * kEntries, stride, bits, entries, here, totals);
            const float step = tables.steps.get()[i * cut.count + s] * 0.5f;
            for (int64_t r = 0; r < kLookedUpRows; r += kLanes) {
                const Ints whole = __builtin_convertvector(load<Halves>(totals + r), Ints);
                const Floats total = (__builtin_convertvector(whole, Floats) - bias) * step;
                float* to = sums + i * kLookedUpRows + r;
                store(to, fused(total, load<Floats>(scale + r), load<Floats>(to)));
            }
        }
    }
    for (int64_t i = 0; i < call.count; ++i) {
        for (int64_t g = 0; g < cut.groups; ++g) {
            add_rows(sums + i * kLookedUpRows, tile.shift.get() + g * kLookedUpRows, tables.sums.get()[i * cut.groups + g]);
        }
    }
}

int lut_matmul(const PintpotGridMatmul& call) {
    const PintpotGrid& grid = call.grid;
    const Segments cut(grid.columns, grid.group, kTableColumns);
    if (!cut.whole()) return 1;
    const int64_t quads = quads_of(grid, cut.groups), tiles = (grid.rows + kLookedUpRows - 1) / kLookedUpRows;
    Tables tables;
    if (!tables.prepare(call, cut, quads)) return 1;
    const int64_t threads = useful_threads(call.threads, grid.rows * grid.columns * call.count, kProductsPerThread);
    bool failed = false;
    pintpot::parallel_for(tiles, threads, [&](int64_t begin, int64_t end) {
        LookedUp tile(cut.groups, call.count);
        if (!tile.whole()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        for (int64_t index = begin; index < end; ++index) {
            const int64_t first = index * kLookedUpRows;
            const int64_t rows = grid.rows - first < kLookedUpRows ? grid.rows - first : kLookedUpRows;
            tile.read(grid, first, rows, cut.groups);
            multiply_tile(call, cut, tables, quads, index, tile);
            with_type(call.dtype, call.output, [&](auto* all) {
                for (int64_t i = 0; i < call.count; ++i) {
                    for (int64_t r = 0; r < rows; ++r) {
                        put(all + i * grid.rows + first + r, tile.sums.get()[i * kLookedUpRows + r]);
                    }
                }
            });
        }
    });
    return failed ? 1 : 0;
}

// The codes of a segment of one row, in whole quads; `row` is its place in its tile.
inline void codes_of(const uint8_t* planes, int64_t stride, int64_t bits, int64_t quads, int64_t row, uint8_t* codes) {
    const int shift = row < kLookedUpRows / 2 ? 0 : 4;
    const int64_t lane = row % (kLookedUpRows / 2);
    for (int64_t q = 0; q < quads; ++q) {
        uint32_t four = 0;
        for (int64_t plane = 0; plane < bits; ++plane) {
            const uint32_t nibble = (planes[plane * stride + q * kEntries + lane] >> shift) & 15u;
            // A bit for each byte: the two lower bits to the lower half, the others to the upper one, then apart.
            const uint32_t halves = (nibble & 3u) | (nibble & 12u) << 14;
            four |= ((halves | halves << 7) & 0x01010101u) << plane;
        }
        for (int64_t i = 0; i < kQuad; ++i) codes[kQuad * q + i] = static_cast<uint8_t>(four >> 8 * i);
    }
}

int planes_dequantize(const PintpotGridDequantize& call) {
    const PintpotGrid& grid = call.grid;
    const Segments cut(grid.columns, grid.group, kTableColumns);
    if (!cut.whole()) return 1;
    const int64_t quads = quads_of(grid, cut.groups), stride = quads * kEntries, groups = cut.groups;
    bool failed = false;
    const int64_t threads = useful_threads(call.threads, grid.rows * grid.columns, kCodesPerThread);
    pintpot::parallel_for(grid.rows, threads, [&](int64_t begin, int64_t end) {
        const Scratch scratch(1, groups > kTableColumns + kQuad ? groups : kTableColumns + kQuad, groups);
        if (!scratch.whole()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        for (int64_t row = begin; row < end; ++row) {
            read_groups(grid, row, groups, scratch.codes.get(), scratch.scale.get(), scratch.zero.get());
            const uint8_t* planes = grid.packed + row / kLookedUpRows * grid.bits * stride;
            with_type(call.dtype, call.output, [&](auto* to) {
                round_scales(scratch.scale.get(), groups, to);
                for (int64_t s = 0; s < cut.count; ++s) {
                    const Segment& segment = cut[s];
                    codes_of(planes + first_quad(grid, segment) * kEntries, stride, grid.bits,
                             quads_of(segment.end - segment.start), row % kLookedUpRows, scratch.codes.get());
                    dequantize_part(segment.start, segment.end, scratch.codes.get(), scratch.scale.get()[segment.group],
                                    scratch.zero.get()[segment.group], to + row * grid.columns);
                }
            });
        }
    });
    return failed ? 1 : 0;
}

}  // namespace
