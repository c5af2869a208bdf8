// Rows of a grid: back to numbers, and times a few inputs without ever being numbers.
//
// The product cuts the columns into segments: at most kSegment columns of one group, or (AVX-512) kJoined columns of
// several small ones. In each segment an input is written in fixed point, relative to its greatest magnitude there, as a
// few small integers a number ("planes"). Products with the codes are then sums of integers, which are exact; only sums
// over segments are rounded. Two planes of 8 bits hold a bfloat16 or float16 input, three hold a float32 one (24 bits,
// as many as its significand has).
//
//     y[row] = sum over segments of scale[row, group] * step[segment] * (sum code * plane)
//              - sum over groups of scale[row, group] * zero[row, group] * (sum x)
//
// Inputs that fixed point cannot hold (NaN, infinities, and segments beyond 1e+-30) take a second route, in float32 and
// in the order of the definition, which the instruction sets without integer products take for all.
#pragma once

#include "dot.h"

namespace {

constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kColumnsAtOnce = 1024;
constexpr int64_t kLine = 64;

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

// Buffers of one thread for some rows: the codes of some segments, the scales and zeros of all groups, and the weights
// of all segments (or groups), of which a vector is loaded at a time.
struct Scratch {
    Buffer<uint8_t> codes;
    Buffer<float> scale, zero, weights;
    int64_t stride;

    Scratch(int64_t rows, int64_t codes, int64_t groups, int64_t most = 0)
        : codes(codes), scale(rows * groups), zero(rows * groups), stride(most + kLanes) {
        weights.reserve(rows * stride);
    }
    bool whole() const { return codes.get() && scale.get() && zero.get() && weights.get(); }
};

// A run of segments, and what belongs to their rows.
struct Run {
    const Segments& cut;
    int64_t begin, end;
    const Codes& codes;
    const Scratch& scratch;
};

// Totals stay in registers over all segments: a vector that is read soon after it was written stalls the processor.
template <int Rows, int Planes, int Fields, bool Joined>
void add_fixed(const Run& run, const Input& input, Floats* sums) {
    Floats totals[Rows];
    for (int r = 0; r < Rows; ++r) totals[r] = sums[r];
    Ints lanes = {};
    for (int i = 0; i < kLanes && Joined; ++i) lanes[i] = static_cast<int32_t>(4 * i / run.cut.group);
    // The fields of a code's neighbours lie in the same bytes, so that most segments touch no new memory. The
    // processor, left to itself, would wait at the start of each row; here rows are asked for while those before are
    // multiplied, a share with each segment.
    const int64_t stride = run.codes.stride, share = (stride + run.cut.count - 1) / run.cut.count;
    const uint8_t* next = run.codes.bytes + Rows * stride;
    const Weights weights = {run.scratch.weights.get(), run.scratch.stride};
    const Place* end = run.codes.places + run.end;
    int64_t asked = 0, due = 0;
    for (const Place* place = run.codes.places + run.begin; place != end; ++place) {
        for (due += Fields ? share : 0; asked < due; asked += kLine) {
            for (int r = 0; r < Rows; ++r) __builtin_prefetch(next + r * stride + asked);
        }
        dot_planes<Rows, Planes, Fields, Joined>(run.codes, *place, input.planes, run.cut.columns, weights, lanes,
                                                 totals);
    }
    for (int r = 0; r < Rows; ++r) sums[r] = totals[r];
}

using Add = void (*)(const Run&, const Input&, Floats*);

template <int Planes, int Fields, bool Joined>
Add add_of(int64_t rows) {
    constexpr Add choice[] = {add_fixed<1, Planes, Fields, Joined>, add_fixed<2, Planes, Fields, Joined>,
                              add_fixed<3, Planes, Fields, Joined>, add_fixed<4, Planes, Fields, Joined>};
    return choice[rows - 1];
}

template <int Planes, bool Joined>
Add add_of(int fields, int64_t rows) {
    if (kDirectStep == 0 || fields == 0) return add_of<Planes, 0, Joined>(rows);
    if (fields == 1) return add_of<Planes, 1, Joined>(rows);
    return fields == 2 ? add_of<Planes, 2, Joined>(rows) : add_of<Planes, 3, Joined>(rows);
}

template <bool Joined>
Add add_of(int planes, int fields, int64_t rows) {
    if (planes == kDigits) return add_of<kDigits, Joined>(fields, rows);
    return planes == 1 ? add_of<1, Joined>(fields, rows) : add_of<kDigits - 1, Joined>(fields, rows);
}

inline Add add_of(bool joined, int planes, int fields, int64_t rows) {
    return joined ? add_of<kJoins>(planes, fields, rows) : add_of<false>(planes, fields, rows);
}

// The weights of a run: scales times steps.
inline void weigh(const Run& run, const float* steps, int64_t rows) {
    const Segments& cut = run.cut;
    const bool aligned = cut.joined || cut.count == cut.groups;
    const int64_t end = cut.weight_of(run.end);
    for (int64_t r = 0; r < rows; ++r) {
        const float* scale = run.scratch.scale.get() + r * cut.groups;
        float* to = run.scratch.weights.get() + r * run.scratch.stride;
        int64_t i = cut.weight_of(run.begin);
        for (; aligned && i + kLanes <= end; i += kLanes) {
            store(to + i, load<Floats>(scale + i) * load<Floats>(steps + i));
        }
        for (; i < end; ++i) to[i] = scale[aligned ? i : cut[i].group] * steps[i];
    }
}

inline void add_floats(const Run& run, const Input& input, int64_t rows, Floats* sums) {
    for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* bytes = run.codes.bytes + r * run.codes.stride;
        for (int64_t s = run.begin; s < run.end; ++s) {
            run.cut.each_group(run.cut[s], [&](int64_t of, int64_t start, int64_t end) {
                const int64_t group = r * run.cut.groups + of;
                sums[r][0] += run.scratch.scale.get()[group] * dot_floats(bytes + start, run.scratch.zero.get()[group],
                                                                          input.numbers + start, end - start);
            });
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

// Writes one input in fixed point, its planes `stride` apart. False where it cannot be.
inline bool fix_input(const Segments& cut, const float* numbers, int planes, Plane* to, int64_t stride, float* steps,
                      float* sums) {
    double total = 0;
    for (int64_t s = 0; s < cut.count; ++s) {
        const Segment segment = cut[s];
        float step;
        if (!step_of(numbers + segment.start, segment.end - segment.start, planes, &step)) return false;
        cut.each_group(segment, [&](int64_t group, int64_t start, int64_t end) {
            if (start == group * cut.group) total = 0;
            total += fix(numbers + start, end - start, step, planes, stride, to + start);
            sums[group] = static_cast<float>(total);
            steps[cut.joined ? group : s] = step;
        });
    }
    return true;
}

// All inputs of a call, prepared once for all rows.
struct Inputs {
    Buffer<float> numbers, steps, sums, times;
    Buffer<Plane> planes;
    Buffer<Input> each;
    Buffer<Place> places;
    Codes packed = {};
    int64_t weights = 0;  // of a row
    bool direct = false;

    bool prepare(const PintpotGridMatmul& call, const Segments& cut) {
        const int64_t columns = call.grid.columns, groups = cut.groups;
        const int count = planes_of(call.dtype, call.digits);
        weights = cut.weight_of(cut.count);
        const bool held = numbers.reserve(call.count * columns) && steps.reserve(call.count * weights) &&
                          sums.reserve(call.count * groups) && planes.reserve(call.count * columns * count) &&
                          each.reserve(call.count);
        if (!held || !places.reserve(cut.count)) return false;
        list_places(cut, places.get());
        packed.places = places.get();
        for (int64_t i = 0; i < call.count; ++i) {
            float *own = numbers.get() + i * columns, *step = steps.get() + i * weights, *sum = sums.get() + i * groups;
            with_type(call.dtype, call.input, [&](const auto* all) { scales_of(all + i * columns, columns, own); });
            Plane* fixed = planes.get() + i * columns * count;
            each.get()[i] = {own, fixed, step, sum, count > 0 && fix_input(cut, own, count, fixed, columns, step, sum)};
        }
        // One input takes codes straight from where they are packed; several share what was unpacked once.
        if (kDirectStep > 0 && call.count == 1 && call.grid.bits < 8 && each.get()[0].fixed) {
            if (!times.reserve(cut.count)) return false;
            packed.stride = packed_bytes(columns, call.grid.bits);
            direct = find_fields(call.grid.bits, cut, kDirectStep, places.get(), times.get(), &packed);
            if (!direct) list_places(cut, places.get());
            for (int64_t s = 0; s < cut.count && direct; ++s) {
                for (int64_t i = cut.weight_of(s); i < cut.weight_of(s + 1); ++i) steps.get()[i] /= times.get()[s];
            }
        }
        return true;
    }
};

// Some rows, at most kRowsAtOnce, times all inputs.
inline void multiply_few(const PintpotGridMatmul& call, const Segments& cut, const Inputs& inputs,
                         const Scratch& scratch, int64_t row, int64_t rows, Floats* sums) {
    const int64_t columns = call.grid.columns, bits = call.grid.bits, bytes = packed_bytes(columns, bits);
    const uint8_t* packed = call.grid.packed + row * bytes;
    const int planes = planes_of(call.dtype, call.digits);
    for (int64_t i = 0; i < call.count * kRowsAtOnce; ++i) sums[i] = Floats{};
    if (inputs.direct) {
        Codes codes = inputs.packed;
        codes.bytes = packed;
        const Add add = add_of(cut.joined, planes, __builtin_popcount(static_cast<unsigned>(bits)), rows);
        const Run run = {cut, 0, cut.count, codes, scratch};
        const Input& input = inputs.each.get()[0];
        weigh(run, input.steps, rows);
        return add(run, input, sums);
    }
    const Add add = planes ? add_of(cut.joined, planes, 0, rows) : nullptr;
    for (int64_t begin = 0, end = 0; begin < cut.count; begin = end) {
        const int64_t first = cut[begin].start;
        for (end = begin + 1; end < cut.count && cut[end].end - first <= kColumnsAtOnce; ++end) continue;
        // A code of 8 bits is its own byte.
        Codes codes = {bits == 8 ? packed : scratch.codes.get() - first, bits == 8 ? bytes : kColumnsAtOnce,
                       inputs.places.get(), {}};
        for (int64_t r = 0; r < rows && bits < 8; ++r) {
            unpack_part(packed + r * bytes, bits, columns, first, cut[end - 1].end,
                        scratch.codes.get() + r * kColumnsAtOnce);
        }
        const Run run = {cut, begin, end, codes, scratch};
        for (int64_t i = 0; i < call.count; ++i) {
            const Input& input = inputs.each.get()[i];
            if (input.fixed) {
                weigh(run, input.steps, rows);
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
    const Scratch scratch(kRowsAtOnce, codes > groups ? codes : groups, groups, inputs.weights);
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
    if (!cut.whole() || !inputs.prepare(call, cut)) return 1;
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

// The numbers of some columns of a row within one group, from their own codes.
template <typename Number>
inline void dequantize_part(int64_t start, int64_t end, const uint8_t* codes, float scale, float zero, Number* row) {
    int64_t i = 0;
    for (; i + kLanes <= end - start; i += kLanes) {
        put_all(row + start + i, (floats_of_bytes(codes + i) - zero) * scale);
    }
    for (; i < end - start; ++i) put(row + start + i, (static_cast<float>(codes[i]) - zero) * scale);
}

template <typename Number>
inline void dequantize_row(const Segments& cut, const uint8_t* codes, const float* scale, const float* zero,
                           Number* to) {
    for (int64_t s = 0; s < cut.count; ++s) {
        cut.each_group(cut[s], [&](int64_t group, int64_t start, int64_t end) {
            dequantize_part(start, end, codes + start, scale[group], zero[group], to);
        });
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
