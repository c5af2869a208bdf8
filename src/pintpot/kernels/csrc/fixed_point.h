// Inputs of products in fixed point, a segment of columns at a time (see grid.h).
#pragma once

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int64_t kSegment = 512;
constexpr float kLargest = 1e30f, kSmallest = 1e-30f;

#if defined(PINTPOT_AVX512) || defined(PINTPOT_DOTPROD)
typedef int8_t Plane;
constexpr int kPlaneBits = 8;
constexpr int kDigits = 3;
#else
typedef int16_t Plane;
constexpr int kPlaneBits = 16;
constexpr int kDigits = 2;
#endif

// Of an input of a dtype, or as many as are asked for; none where there are no integer products.
inline int planes_of(int64_t dtype, int64_t digits) {
#if defined(PINTPOT_AVX512) || defined(PINTPOT_AVX2) || defined(PINTPOT_NEON)
    const int held = dtype == kFloat32 ? kDigits : kDigits - 1;
    return digits > 0 && digits < held ? static_cast<int>(digits) : held;
#else
    (void)dtype;
    (void)digits;
    return 0;
#endif
}

// Memory that frees itself. (A class of the standard library would be one function for all instruction sets, compiled
// for whichever the linker happens to take.)
template <typename Number>
class Buffer {
   public:
    Buffer() = default;
    explicit Buffer(int64_t count) { reserve(count); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    bool reserve(int64_t count) {
        // In whole lines of the cache, which also suits vectors.
        const size_t bytes = sizeof(Number) * static_cast<size_t>(count > 0 ? count : 1);
        data_ = static_cast<Number*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        return data_ != nullptr;
    }
    Number* get() const { return data_; }

   private:
    Number* data_ = nullptr;
};

// A run of columns: a part of a group, or several whole groups, of which `group` is the first.
struct Segment {
    int64_t start, end, group;
};

// Whether small groups are put together into segments, and of how many columns.
#if defined(PINTPOT_AVX512)
constexpr bool kJoins = true;
#else
constexpr bool kJoins = false;
#endif
constexpr int64_t kJoined = 64;

// The segments of a row, in order. (They are listed because divisions would take longer than the products.)
struct Segments {
    int64_t columns, group, groups, count;
    bool joined;  // whether a segment has several groups: kJoined columns of them
    Buffer<Segment> list;

    Segments(int64_t columns, int64_t group, int64_t widest = kSegment)
        : columns(columns), group(group), groups((columns + group - 1) / group), count(0) {
        joined = kJoins && widest == kSegment && group >= 4 && group < kJoined && kJoined % group == 0 &&
                 columns % kJoined == 0;
        const int64_t span = joined ? kJoined : group, most = joined ? kJoined : widest;
        const int64_t each = (span + most - 1) / most;
        if (!list.reserve((columns + span - 1) / span * each)) return;
        for (int64_t first = 0; first < columns; first += span) {
            const int64_t end = first + span < columns ? first + span : columns;
            for (int64_t start = first; start < end; start += most) {
                list.get()[count++] = {start, start + most < end ? start + most : end, start / group};
            }
        }
    }
    bool whole() const { return list.get() != nullptr; }
    const Segment& operator[](int64_t place) const { return list.get()[place]; }

    // Which weight is the first of a segment's: there is one for each segment, or for each of its groups.
    int64_t weight_of(int64_t segment) const {
        if (!joined) return segment;
        return segment < count ? list.get()[segment].group : groups;
    }

    // Calls `visit(group, start, end)` for each group, or part of one, in a segment.
    template <typename Visit>
    void each_group(const Segment& segment, const Visit& visit) const {
        int64_t of = segment.group;
        for (int64_t start = segment.start; start < segment.end; ++of) {
            const int64_t end = (of + 1) * group < segment.end ? (of + 1) * group : segment.end;
            visit(of, start, end);
            start = end;
        }
    }
};

// One input: as floats, and as planes where `fixed`.
struct Input {
    const float* numbers;
    const Plane* planes;  // (planes, columns), the most significant first
    const float* steps;   // for each weight
    const float* sums;    // (groups,) of the fixed-point numbers
    bool fixed;
};

// The greatest integer that signed digits of so many planes can hold.
inline double limit_of(int planes) {
    double limit = 0;
    for (int plane = 0; plane < planes; ++plane) limit = limit * (1 << kPlaneBits) + ((1 << (kPlaneBits - 1)) - 1);
    return limit;
}

// What the integers of a segment are multiples of. False where fixed point cannot hold it.
inline bool step_of(const float* from, int64_t count, int planes, float* step) {
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
        const float size = std::fabs(from[i]);
        finite &= size < kLargest;
        most = size > most ? size : most;
    }
    *step = static_cast<float>(most / limit_of(planes));
    return finite && (most == 0 || most >= kSmallest);
}

// Writes some numbers in fixed point; gives the sum of what was written.
inline double fix(const float* from, int64_t count, float step, int planes, int64_t stride, Plane* to) {
    const double limit = limit_of(planes), inverse = step > 0 ? 1.0 / step : 0.0;
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
        double scaled = from[i] * inverse;
        scaled = scaled > limit ? limit : (scaled < -limit ? -limit : scaled);
        int64_t value = static_cast<int64_t>(std::nearbyint(scaled));
        total += static_cast<double>(value) * step;
        for (int plane = planes - 1; plane >= 0; --plane) {
            const Plane digit = static_cast<Plane>(value);
            to[plane * stride + i] = digit;
            value = (value - digit) >> kPlaneBits;
        }
    }
    return total;
}

}  // namespace
