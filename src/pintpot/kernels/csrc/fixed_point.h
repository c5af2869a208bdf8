// Inputs of products in fixed point, a segment of columns at a time (see grid.h).
#pragma once

#include <cstdlib>

#include "simd.h"

namespace {

constexpr int64_t kSegment = 512;
constexpr float kLargest = 1e30f, kSmallest = 1e-30f;

#if defined(PINTPOT_AVX512)
typedef int8_t Plane;
constexpr int kPlaneBits = 8;
#else
typedef int16_t Plane;
constexpr int kPlaneBits = 16;
#endif

inline int planes_of(int64_t dtype) {
#if defined(PINTPOT_AVX512)
    return dtype == kFloat32 ? 3 : 2;
#elif defined(PINTPOT_AVX2)
    return dtype == kFloat32 ? 2 : 1;
#else
    (void)dtype;
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

struct Segment {
    int64_t start, end, group;
};

// The segments of a row, in order. (They are listed because divisions would take longer than the products.)
struct Segments {
    int64_t columns, group, groups, count;
    Buffer<Segment> list;

    Segments(int64_t columns, int64_t group, int64_t most = kSegment)
        : columns(columns), group(group), groups((columns + group - 1) / group) {
        const int64_t each = (group + most - 1) / most;
        count = 0;
        if (!list.reserve(groups * each)) return;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t end = (g + 1) * group < columns ? (g + 1) * group : columns;
            for (int64_t start = g * group; start < end; start += most) {
                list.get()[count++] = {start, start + most < end ? start + most : end, g};
            }
        }
    }
    bool whole() const { return list.get() != nullptr; }
    const Segment& operator[](int64_t place) const { return list.get()[place]; }
};

// One input: as floats, and as planes where `fixed`.
struct Input {
    const float* numbers;
    const Plane* planes;  // (planes, columns), the most significant first
    const float* steps;   // (segments,)
    const float* sums;    // (groups,) of the fixed-point numbers
    bool fixed;
};

// Writes one segment in fixed point. False where it cannot be.
inline bool fix_segment(const float* from, int64_t count, int planes, int64_t stride, Plane* to, float* step,
                        double* total) {
    float most = 0;
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
        const float size = std::fabs(from[i]);
        finite &= size < kLargest;
        most = size > most ? size : most;
    }
    if (!finite || (most > 0 && most < kSmallest)) return false;
    const int top = (1 << (kPlaneBits - 1)) - 1;
    // The greatest integer that signed digits of so many bits can hold.
    double limit = 0;
    for (int plane = 0; plane < planes; ++plane) limit = limit * (1 << kPlaneBits) + top;
    *step = static_cast<float>(most / limit);
    const double inverse = most > 0 ? 1.0 / *step : 0.0;
    for (int64_t i = 0; i < count; ++i) {
        double scaled = from[i] * inverse;
        scaled = scaled > limit ? limit : (scaled < -limit ? -limit : scaled);
        int64_t value = static_cast<int64_t>(std::nearbyint(scaled));
        *total += static_cast<double>(value) * *step;
        for (int plane = planes - 1; plane >= 0; --plane) {
            const Plane digit = static_cast<Plane>(value);
            to[plane * stride + i] = digit;
            value = (value - digit) >> kPlaneBits;
        }
    }
    return true;
}

}  // namespace
