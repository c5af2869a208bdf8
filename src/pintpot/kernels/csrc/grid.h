// Rows of a grid: back to numbers, and times a few inputs without ever being numbers.
//
// The product cuts the columns into segments of at most kSegment within one group. In each segment an input is written
// in fixed point, relative to its greatest magnitude there, as a few small integers a number ("planes"). Products with
// the codes are then sums of integers, which are exact; only sums over segments are rounded. Two planes of 8 bits hold
// a bfloat16 or float16 input, three hold a float32 one (24 bits, as many as its significand has).
//
//     y[row] = sum over segments of scale[row, group] * step[segment] * (sum code * plane)
//              - sum over groups of scale[row, group] * zero[row, group] * (sum x)
//
// Inputs that fixed point cannot hold (NaN, infinities, and segments beyond 1e+-30) take a second route, in float32 and
// in the order of the definition, which the instruction sets without integer products take for all.
#pragma once

#include "fixed_point.h"
#include "packing.h"

namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kColumnsAtOnce = 1024;

template <typename Number>
inline void scales_of(const Number* scale, int64_t groups, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= groups; i += kLanes) store(to + i, numbers(scale + i));
    for (; i < groups; ++i) to[i] = number(scale[i]);
}

// The scales and zeros of a row as floats.
inline void read_groups(const PintpotGrid& grid, int64_t row, int64_t groups, uint8_t* codes, float* scale,
                        float* zero) {
    with_type(grid.scale_dtype, grid.scale, [&](const auto* all) { scales_of(all + row * groups, groups, scale); });
    if (grid.zero == nullptr) {
        for (int64_t i = 0; i < groups; ++i) zero[i] = static_cast<float>(1 << (grid.bits - 1));
        return;
    }
    unpack_row(grid.zero + row * packed_bytes(groups, grid.bits), grid.bits, groups, codes);
    for (int64_t i = 0; i < groups; ++i) zero[i] = codes[i];
}

// sum (code - zero) * x of one segment, in float32.
inline float dot_floats(const uint8_t* codes, float zero, const float* x, int64_t count) {
    Floats total = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        total = fused(floats_of_bytes(codes + i) - zero, load<Floats>(x + i), total);
    }
    float rest = sum(total);
    for (; i < count; ++i) rest += (static_cast<float>(codes[i]) - zero) * x[i];
    return rest;
}

// Where the codes of some rows are: as bytes from the column `first` on, or packed, in up to three fields a code.
struct Place {
    int64_t offset[3];
    int right[3];
};

struct Codes {
    const uint8_t* bytes;
    int64_t stride, first;  // from row to row
    const Place* places;    // of each segment where they are packed
    uint64_t mask[3];       // spread
    int left[3];
};

// Finds the fields of all segments. False where a segment lies in two planes of a field, or is no multiple of `step`.
inline bool find_places(int64_t bits, const Segments& cut, int64_t step, Place* places, Codes* codes) {
    bool found = true;
    for (int64_t s = 0; s < cut.count && found; ++s) {
        const int64_t start = cut[s].start, end = cut[s].end;
        int f = 0;
        found = (end - start) % step == 0;
        each_field(bits, cut.columns, [&](int field, int shift, int64_t byte) {
            const int64_t width = field_bytes(cut.columns, field), plane = start / width;
            found &= (end - 1) / width == plane;
            places[s].offset[f] = byte + start - plane * width;
            places[s].right[f] = static_cast<int>(plane) * field;
            codes->mask[f] = spread((1 << field) - 1);
            codes->left[f++] = shift;
        });
    }
    codes->places = places;
    return found;
}

#if defined(PINTPOT_AVX512)

constexpr int64_t kDirectStep = 64;

// 64 codes; `Fields` is 0 for bytes.
template <int Fields>
inline __m512i fetch(const Codes& codes, const uint8_t* from, const Place* place) {
    if (Fields == 0) return _mm512_loadu_si512(from);
    Octets found = {};
    for (int f = 0; f < (Fields ? Fields : 1); ++f) {
        const Octets part = load<Octets>(from + place->offset[f]);
        found |= field_of(part, place->right[f], codes.mask[f], f ? codes.left[f] : 0);
    }
    return reinterpret_cast<__m512i>(found);
}

// Adds `weight * sum code * x` of one segment for `Rows` rows of codes to their totals, whose lanes are summed later.
template <int Rows, int Planes, int Fields>
inline void dot_planes(const Codes& codes, const uint8_t* bytes, const Place* place, const Plane* x, int64_t stride,
                       int64_t count, const float* weights, Floats* totals) {
    __m512i sums[Planes][Rows];
    for (int p = 0; p < Planes; ++p) {
        for (int r = 0; r < Rows; ++r) sums[p][r] = _mm512_setzero_si512();
    }
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
        __m512i planes[Planes];
        for (int p = 0; p < Planes; ++p) planes[p] = _mm512_loadu_si512(x + p * stride + i);
        for (int r = 0; r < Rows; ++r) {
            const __m512i row = fetch<Fields>(codes, bytes + r * codes.stride + i, place);
            for (int p = 0; p < Planes; ++p) sums[p][r] = _mm512_dpbusd_epi32(sums[p][r], row, planes[p]);
        }
    }
    if (Fields == 0 && i < count) {
        const __mmask64 some = (1ull << (count - i)) - 1;
        for (int r = 0; r < Rows; ++r) {
            const __m512i row = _mm512_maskz_loadu_epi8(some, bytes + r * codes.stride + i);
            for (int p = 0; p < Planes; ++p) {
                const __m512i plane = _mm512_maskz_loadu_epi8(some, x + p * stride + i);
                sums[p][r] = _mm512_dpbusd_epi32(sums[p][r], row, plane);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        // At most 512 / 64 * 4 products of 255 * 127 in a lane, so that 8 bits more fit too.
        __m512i high = sums[0][r];
        if (Planes > 1) high = _mm512_add_epi32(_mm512_slli_epi32(high, 8), sums[1][r]);
        Floats value = _mm512_cvtepi32_ps(high);
        if (Planes > 2) value = fused(value, all(256.0f), _mm512_cvtepi32_ps(sums[Planes - 1][r]));
        totals[r] = fused(value, all(weights[r]), totals[r]);
    }
}

#elif defined(PINTPOT_AVX2)

constexpr int64_t kDirectStep = 0;

template <int Rows, int Planes, int Fields>
inline void dot_planes(const Codes& codes, const uint8_t* bytes, const Place*, const Plane* x, int64_t stride,
                       int64_t count, const float* weights, Floats* totals) {
    __m256i sums[Planes][Rows];
    for (int p = 0; p < Planes; ++p) {
        for (int r = 0; r < Rows; ++r) sums[p][r] = _mm256_setzero_si256();
    }
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m256i planes[Planes];
        for (int p = 0; p < Planes; ++p) {
            planes[p] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + p * stride + i));
        }
        for (int r = 0; r < Rows; ++r) {
            const __m256i row = _mm256_cvtepu8_epi16(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + r * codes.stride + i)));
            for (int p = 0; p < Planes; ++p) {
                sums[p][r] = _mm256_add_epi32(sums[p][r], _mm256_madd_epi16(row, planes[p]));
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        Floats value = {};
        for (int p = 0; p < Planes; ++p) {
            int64_t rest = 0;
            for (int64_t j = i; j < count; ++j) {
                rest += static_cast<int64_t>(bytes[r * codes.stride + j]) * x[p * stride + j];
            }
            Floats plane = _mm256_cvtepi32_ps(sums[p][r]);
            plane[0] += static_cast<float>(rest);
            value = fused(value, all(65536.0f), plane);
        }
        totals[r] = fused(value, all(weights[r]), totals[r]);
    }
}

#else

constexpr int64_t kDirectStep = 0;

template <int Rows, int Planes, int Fields>
inline void dot_planes(const Codes&, const uint8_t*, const Place*, const Plane*, int64_t, int64_t, const float*,
                       Floats*) {}

#endif

// Buffers of one thread for some rows: the codes of some segments, and the scales and zeros of all groups.
struct Scratch {
    Buffer<uint8_t> codes;
    Buffer<float> scale, zero;

    Scratch(int64_t rows, int64_t codes, int64_t groups) : codes(codes), scale(rows * groups), zero(rows * groups) {}
    bool whole() const { return codes.get() && scale.get() && zero.get(); }
};

// A run of segments, and the scales and zeros of their rows.
struct Run {
    const Segments& cut;
    int64_t begin, end;
    const Codes& codes;
    const float* scale;
    const float* zero;
};

// Totals stay in registers over all segments: a vector that is read soon after it was written stalls the processor.
template <int Rows, int Planes, int Fields>
void add_fixed(const Run& run, const Input& input, Floats* sums) {
    Floats totals[Rows];
    for (int r = 0; r < Rows; ++r) totals[r] = sums[r];
    for (int64_t s = run.begin; s < run.end; ++s) {
        const Segment segment = run.cut[s];
        float weights[Rows];
        for (int r = 0; r < Rows; ++r) weights[r] = run.scale[r * run.cut.groups + segment.group] * input.steps[s];
        const uint8_t* bytes = run.codes.bytes + (Fields ? 0 : segment.start - run.codes.first);
        dot_planes<Rows, Planes, Fields>(run.codes, bytes, run.codes.places + (Fields ? s : 0),
                                         input.planes + segment.start, run.cut.columns, segment.end - segment.start,
                                         weights, totals);
    }
    for (int r = 0; r < Rows; ++r) sums[r] = totals[r];
}

using Add = void (*)(const Run&, const Input&, Floats*);

template <int Planes, int Fields>
Add add_of(int64_t rows) {
    constexpr Add choice[] = {add_fixed<1, Planes, Fields>, add_fixed<2, Planes, Fields>, add_fixed<3, Planes, Fields>,
                              add_fixed<4, Planes, Fields>};
    return choice[rows - 1];
}

template <int Planes>
Add add_of(int fields, int64_t rows) {
    if (kDirectStep == 0 || fields == 0) return add_of<Planes, 0>(rows);
    if (fields == 1) return add_of<Planes, 1>(rows);
    return fields == 2 ? add_of<Planes, 2>(rows) : add_of<Planes, 3>(rows);
}

inline Add add_of(int planes, int fields, int64_t rows) {
    if (planes == 3) return add_of<3>(fields, rows);
    return planes == 2 ? add_of<2>(fields, rows) : add_of<1>(fields, rows);
}

inline void add_floats(const Run& run, const Input& input, int64_t rows, Floats* sums) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t s = run.begin; s < run.end; ++s) {
            const Segment segment = run.cut[s];
            const int64_t group = r * run.cut.groups + segment.group;
            const uint8_t* bytes = run.codes.bytes + r * run.codes.stride + segment.start - run.codes.first;
            sums[r][0] += run.scale[group] * dot_floats(bytes, run.zero[group], input.numbers + segment.start,
                                                        segment.end - segment.start);
        }
    }
}

// What the zeros of a row take away.
inline float shift_of(const Input& input, const float* scale, const float* zero, int64_t groups) {
    Floats total = {};
    int64_t g = 0;
    for (; g + kLanes <= groups; g += kLanes) {
        total = fused(load<Floats>(zero + g) * load<Floats>(scale + g), load<Floats>(input.sums + g), total);
    }
    float rest = sum(total);
    for (; g < groups; ++g) rest += zero[g] * scale[g] * input.sums[g];
    return rest;
}

// All inputs of a call, prepared once for all rows.
struct Inputs {
    Buffer<float> numbers, steps, sums;
    Buffer<Plane> planes;
    Buffer<Input> each;
    Buffer<Place> places;
    Codes packed = {};
    bool direct = false;

    bool prepare(const PintpotGridMatmul& call, const Segments& cut, int64_t groups) {
        const int64_t columns = call.grid.columns;
        const int count = planes_of(call.dtype);
        const bool held = numbers.reserve(call.count * columns) && steps.reserve(call.count * cut.count) &&
                          sums.reserve(call.count * groups) && planes.reserve(call.count * columns * count) &&
                          each.reserve(call.count);
        if (!held) return false;
        for (int64_t i = 0; i < call.count; ++i) {
            float* own = numbers.get() + i * columns;
            with_type(call.dtype, call.input, [&](const auto* all) { scales_of(all + i * columns, columns, own); });
            Plane* fixed = planes.get() + i * columns * count;
            Input& input = each.get()[i];
            input = {own, fixed, steps.get() + i * cut.count, sums.get() + i * groups, count > 0};
            double total = 0;
            for (int64_t s = 0; s < cut.count && input.fixed; ++s) {
                const Segment segment = cut[s];
                if (s == 0 || cut[s - 1].group != segment.group) total = 0;
                input.fixed = fix_segment(own + segment.start, segment.end - segment.start, count, columns,
                                          fixed + segment.start, steps.get() + i * cut.count + s, &total);
                sums.get()[i * groups + segment.group] = static_cast<float>(total);
            }
        }
        // One input takes codes straight from where they are packed; several share what was unpacked once.
        if (kDirectStep > 0 && call.count == 1 && call.grid.bits < 8 && each.get()[0].fixed) {
            if (!places.reserve(cut.count)) return false;
            packed.stride = packed_bytes(columns, call.grid.bits);
            direct = find_places(call.grid.bits, cut, kDirectStep, places.get(), &packed);
        }
        return true;
    }
};

// Some rows, at most kRowsAtOnce, times all inputs.
inline void multiply_few(const PintpotGridMatmul& call, const Segments& cut, const Inputs& inputs,
                         const Scratch& scratch, int64_t row, int64_t rows, Floats* sums) {
    const int64_t columns = call.grid.columns, bits = call.grid.bits, bytes = packed_bytes(columns, bits);
    const uint8_t* packed = call.grid.packed + row * bytes;
    const int planes = planes_of(call.dtype);
    const float *scale = scratch.scale.get(), *zero = scratch.zero.get();
    for (int64_t i = 0; i < call.count * kRowsAtOnce; ++i) sums[i] = Floats{};
    if (inputs.direct) {
        Codes codes = inputs.packed;
        codes.bytes = packed;
        const Add add = add_of(planes, __builtin_popcount(static_cast<unsigned>(bits)), rows);
        return add({cut, 0, cut.count, codes, scale, zero}, inputs.each.get()[0], sums);
    }
    const Add add = planes ? add_of(planes, 0, rows) : nullptr;
    for (int64_t begin = 0, end = 0; begin < cut.count; begin = end) {
        const int64_t first = cut[begin].start;
        for (end = begin + 1; end < cut.count && cut[end].end - first <= kColumnsAtOnce; ++end) continue;
        Codes codes = {scratch.codes.get(), kColumnsAtOnce, first, nullptr, {}, {}};
        if (bits == 8) {
            // A code of 8 bits is its own byte.
            codes.bytes = packed + first;
            codes.stride = bytes;
        }
        for (int64_t r = 0; r < rows && bits < 8; ++r) {
            unpack_part(packed + r * bytes, bits, columns, first, cut[end - 1].end,
                        scratch.codes.get() + r * kColumnsAtOnce);
        }
        const Run run = {cut, begin, end, codes, scale, zero};
        for (int64_t i = 0; i < call.count; ++i) {
            const Input& input = inputs.each.get()[i];
            if (input.fixed) {
                add(run, input, sums + i * kRowsAtOnce);
            } else {
                add_floats(run, input, rows, sums + i * kRowsAtOnce);
            }
        }
    }
}

// The rows `begin` to `end` of the matrix times all inputs.
bool multiply_rows(const PintpotGridMatmul& call, const Segments& cut, const Inputs& inputs, int64_t begin,
                   int64_t end) {
    const PintpotGrid& grid = call.grid;
    const int64_t groups = cut.groups, codes = kRowsAtOnce * kColumnsAtOnce;
    const Scratch scratch(kRowsAtOnce, codes > groups ? codes : groups, groups);
    Buffer<Floats> sums(call.count * kRowsAtOnce);
    if (!scratch.whole() || !sums.get()) return false;
    for (int64_t row = begin; row < end; row += kRowsAtOnce) {
        const int64_t rows = end - row < kRowsAtOnce ? end - row : kRowsAtOnce;
        for (int64_t r = 0; r < rows; ++r) {
            read_groups(grid, row + r, groups, scratch.codes.get(), scratch.scale.get() + r * groups,
                        scratch.zero.get() + r * groups);
        }
        multiply_few(call, cut, inputs, scratch, row, rows, sums.get());
        for (int64_t i = 0; i < call.count; ++i) {
            const Input& input = inputs.each.get()[i];
            for (int64_t r = 0; r < rows; ++r) {
                float value = sum(sums.get()[i * kRowsAtOnce + r]);
                if (input.fixed) {
                    value -= shift_of(input, scratch.scale.get() + r * groups, scratch.zero.get() + r * groups, groups);
                }
                with_type(call.dtype, call.output, [&](auto* all) { put(all + i * grid.rows + row + r, value); });
            }
        }
    }
    return true;
}

constexpr int64_t kProductsPerThread = 1 << 17;

int grid_matmul(const PintpotGridMatmul& call) {
    const PintpotGrid& grid = call.grid;
    const Segments cut(grid.columns, grid.group);
    Inputs inputs;
    if (!cut.whole() || !inputs.prepare(call, cut, cut.groups)) return 1;
    const int64_t work = grid.rows * grid.columns * call.count;
    bool failed = false;
    pintpot::parallel_for(grid.rows, useful_threads(call.threads, work, kProductsPerThread),
                          [&](int64_t begin, int64_t end) {
                              if (!multiply_rows(call, cut, inputs, begin, end)) {
                                  __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
                              }
                          });
    return failed ? 1 : 0;
}

// The numbers of one segment of a row, from its own codes.
template <typename Number>
inline void dequantize_segment(const Segment& segment, const uint8_t* codes, float scale, float zero, Number* row) {
    Number* to = row + segment.start;
    const int64_t count = segment.end - segment.start;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) put_all(to + i, (floats_of_bytes(codes + i) - zero) * scale);
    for (; i < count; ++i) put(to + i, (static_cast<float>(codes[i]) - zero) * scale);
}

template <typename Number>
inline void dequantize_row(const Segments& cut, const uint8_t* codes, const float* scale, const float* zero,
                           Number* to) {
    for (int64_t s = 0; s < cut.count; ++s) {
        const int64_t group = cut[s].group;
        dequantize_segment(cut[s], codes + cut[s].start, scale[group], zero[group], to);
    }
}

// A scale in the precision of the numbers that it makes.
template <typename Number>
inline void round_scales(float* scale, int64_t groups, Number*) {
    for (int64_t g = 0; g < groups; ++g) {
        Number rounded;
        put(&rounded, scale[g]);
        scale[g] = number(rounded);
    }
}

int grid_dequantize(const PintpotGridDequantize& call) {
    const PintpotGrid& grid = call.grid;
    const Segments cut(grid.columns, grid.group);
    const int64_t columns = grid.columns, groups = cut.groups, bytes = packed_bytes(columns, grid.bits);
    if (!cut.whole()) return 1;
    const int64_t threads = useful_threads(call.threads, grid.rows * columns, kCodesPerThread);
    bool failed = false;
    pintpot::parallel_for(grid.rows, threads, [&](int64_t begin, int64_t end) {
        const Scratch scratch(1, columns > groups ? columns : groups, groups);
        if (!scratch.whole()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        for (int64_t row = begin; row < end; ++row) {
            read_groups(grid, row, groups, scratch.codes.get(), scratch.scale.get(), scratch.zero.get());
            unpack_row(grid.packed + row * bytes, grid.bits, columns, scratch.codes.get());
            with_type(call.dtype, call.output, [&](auto* to) {
                round_scales(scratch.scale.get(), groups, to);
                dequantize_row(cut, scratch.codes.get(), scratch.scale.get(), scratch.zero.get(), to + row * columns);
            });
        }
    });
    return failed ? 1 : 0;
}

}  // namespace
