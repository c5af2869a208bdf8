// Products of the codes of some rows with an input in fixed point, one segment at a time (see grid.h).
#pragma once

#include "fixed_point.h"
#include "packing.h"

namespace {

// A segment as the products go through it: its columns, its (first) weight, and where its codes are in a row, as bytes
// or packed in up to three fields a code.
struct Place {
    int64_t column, count, weight;
    int64_t offset[3];
    uint64_t rotate[3];  // bits to the right that bring each field to its place in the code
    uint64_t mask;
};

// Where the codes of some rows are.
struct Codes {
    const uint8_t* bytes;
    int64_t stride;  // from row to row
    const Place* places;
    uint64_t lower[2];  // the bits of a code below its second, and its third, field
};

// What the sums of a segment are worth in each row: a number for the segment, or for each of its groups.
struct Weights {
    const float* first;
    int64_t stride;
    const float* of(int row, const Place& place) const { return first + row * stride + place.weight; }
};

// Lists the segments of rows whose codes are bytes.
inline void list_places(const Segments& cut, Place* places) {
    for (int64_t s = 0; s < cut.count; ++s) {
        const int64_t start = cut[s].start;
        places[s] = {start, cut[s].end - start, cut.weight_of(s), {start, 0, 0}, {}, 0};
    }
}

// Finds the fields of all segments, and how often each code is counted. Codes of one field stay where they are in their
// bytes, and so count 2, 4, ... times; those of several fields are brought together. False where a segment lies in two
// planes of a field, or is no multiple of `step`.
inline bool find_fields(int64_t bits, const Segments& cut, int64_t step, Place* places, float* times, Codes* codes) {
    bool found = true;
    const bool alone = (bits & (bits - 1)) == 0;
    for (int64_t s = 0; s < cut.count && found; ++s) {
        const int64_t start = cut[s].start, end = cut[s].end;
        int f = 0;
        found = (end - start) % step == 0;
        times[s] = 1;
        each_field(bits, cut.columns, [&](int field, int shift, int64_t byte) {
            const int64_t width = field_bytes(cut.columns, field), plane = start / width;
            found &= (end - 1) / width == plane;
            const int right = static_cast<int>(plane) * field;
            places[s].offset[f] = byte + start - plane * width;
            places[s].rotate[f] = static_cast<uint64_t>(right - shift) % 64;
            if (f > 0) codes->lower[f - 1] = spread((1 << shift) - 1);
            if (alone) times[s] = static_cast<float>(1 << right);
            places[s].mask = spread(alone ? ((1 << field) - 1) << right : (1 << bits) - 1);
            ++f;
        });
    }
    return found;
}

#if defined(PINTPOT_AVX512)

constexpr int64_t kDirectStep = 64;

inline __m512i everywhere(uint64_t word) { return _mm512_set1_epi64(static_cast<int64_t>(word)); }

// 64 codes of a row; `Fields` is 0 for bytes.
template <int Fields>
inline __m512i fetch(const Codes& codes, const uint8_t* from, const Place& place) {
    __m512i found = _mm512_loadu_si512(from);
    if (Fields == 0) return found;
    if (Fields > 1) found = _mm512_rorv_epi64(found, everywhere(place.rotate[0]));
    for (int f = 1; f < Fields; ++f) {
        const __m512i part = _mm512_loadu_si512(from + place.offset[f] - place.offset[0]);
        // The bits of the fields so far, and above them those of this one.
        found = _mm512_ternarylogic_epi64(everywhere(codes.lower[f - 1]), found,
                                          _mm512_rorv_epi64(part, everywhere(place.rotate[f])), 0xCA);
    }
    return _mm512_and_si512(found, everywhere(place.mask));
}

// sum + the products of 4 codes and 4 numbers in each lane. (The compiler's own name for this instruction costs it a copy
// of each sum.)
inline __m512i dot(__m512i sum, __m512i codes, __m512i numbers) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(numbers));
    return sum;
}

// The weight of each lane, which has 4 columns.
template <bool Joined>
inline Floats weight_of(const float* weights, Ints lanes) {
    if (!Joined) return all(weights[0]);
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(lanes), _mm512_loadu_ps(weights));
}

// Adds `weight * sum code * x` of one segment for `Rows` rows of codes to their totals, whose lanes are summed later.
template <int Rows, int Planes, int Fields, bool Joined>
inline void dot_planes(const Codes& codes, const Place& place, const Plane* x, int64_t stride, const Weights& weights,
                       Ints lanes, Floats* totals) {
    __m512i sums[Planes][Rows];
    for (int p = 0; p < Planes; ++p) {
        for (int r = 0; r < Rows; ++r) sums[p][r] = _mm512_setzero_si512();
    }
    const uint8_t* from = codes.bytes + place.offset[0];
    x += place.column;
    int64_t left = place.count;
    for (; left >= 64; left -= 64, from += 64, x += 64) {
        __m512i planes[Planes];
        for (int p = 0; p < Planes; ++p) planes[p] = _mm512_loadu_si512(x + p * stride);
        for (int r = 0; r < Rows; ++r) {
            const __m512i row = fetch<Fields>(codes, from + r * codes.stride, place);
            for (int p = 0; p < Planes; ++p) sums[p][r] = dot(sums[p][r], row, planes[p]);
        }
    }
    if (Fields == 0 && left > 0) {
        const __mmask64 some = (1ull << left) - 1;
        for (int r = 0; r < Rows; ++r) {
            const __m512i row = _mm512_maskz_loadu_epi8(some, from + r * codes.stride);
            for (int p = 0; p < Planes; ++p) {
                const __m512i plane = _mm512_maskz_loadu_epi8(some, x + p * stride);
                sums[p][r] = dot(sums[p][r], row, plane);
            }
        }
    }
    for (int r = 0; r < Rows; ++r) {
        // At most 512 / 64 * 4 products of 255 * 127 in a lane, so that 8 bits more fit too.
        __m512i high = sums[0][r];
        if (Planes > 1) high = _mm512_add_epi32(_mm512_slli_epi32(high, 8), sums[1][r]);
        Floats value = _mm512_cvtepi32_ps(high);
        if (Planes > 2) value = fused(value, all(256.0f), _mm512_cvtepi32_ps(sums[Planes - 1][r]));
        totals[r] = fused(value, weight_of<Joined>(weights.of(r, place), lanes), totals[r]);
    }
}

#elif defined(PINTPOT_AVX2) || defined(PINTPOT_NEON)

constexpr int64_t kDirectStep = 0;

// The digits of some columns as they are loaded at once, and their codes beside them.
typedef Plane Digits __attribute__((vector_size(4 * kLanes)));
constexpr int64_t kStep = sizeof(Digits) / sizeof(Plane);

// Codes are this much less beside digits of 8 bits, with which only signed bytes are multiplied.
constexpr int kLess = sizeof(Plane) == 1 ? 128 : 0;

inline Digits codes_at(const uint8_t* from) {
#if defined(PINTPOT_AVX2)
    return reinterpret_cast<Digits>(
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(PINTPOT_DOTPROD)
    return reinterpret_cast<Digits>(veorq_u8(vld1q_u8(from), vdupq_n_u8(kLess)));
#else
    return reinterpret_cast<Digits>(vmovl_u8(vld1_u8(from)));
#endif
}

// sum + the products of the codes and the digits, each in one of the lanes.
inline Ints dot(Ints sum, Digits codes, Digits digits) {
#if defined(PINTPOT_AVX2)
    return sum + reinterpret_cast<Ints>(
                     _mm256_madd_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(digits)));
#elif defined(PINTPOT_DOTPROD)
    return vdotq_s32(sum, codes, digits);
#else
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(codes), vget_low_s16(digits)), codes, digits);
#endif
}

template <int Rows, int Planes, int Fields, bool Joined>
inline void dot_planes(const Codes& codes, const Place& place, const Plane* x, int64_t stride, const Weights& weights,
                       Ints, Floats* totals) {
    const uint8_t* bytes = codes.bytes + place.offset[0];
    const int64_t count = place.count;
    x += place.column;
    Ints sums[Planes][Rows] = {}, digits[Planes] = {};
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
        Digits planes[Planes];
        for (int p = 0; p < Planes; ++p) {
            planes[p] = load<Digits>(x + p * stride + i);
            if (kLess) digits[p] = dot(digits[p], Digits{} + 1, planes[p]);
        }
        for (int r = 0; r < Rows; ++r) {
            const Digits row = codes_at(bytes + r * codes.stride + i);
            for (int p = 0; p < Planes; ++p) sums[p][r] = dot(sums[p][r], row, planes[p]);
        }
    }
    for (int r = 0; r < Rows; ++r) {
        Floats value = {};
        for (int p = 0; p < Planes; ++p) {
            // At most 512 / 4 products of 255 and a digit in a lane, which fit into 32 bits.
            int64_t rest = 0;
            for (int64_t j = i; j < count; ++j) {
                rest += static_cast<int64_t>(bytes[r * codes.stride + j]) * x[p * stride + j];
            }
            Floats plane = __builtin_convertvector(sums[p][r] + digits[p] * kLess, Floats);
            plane[0] += static_cast<float>(rest);
            value = fused(value, all(static_cast<float>(1 << kPlaneBits)), plane);
        }
        totals[r] = fused(value, all(weights.of(r, place)[0]), totals[r]);
    }
}

#else

constexpr int64_t kDirectStep = 0;

template <int Rows, int Planes, int Fields, bool Joined>
inline void dot_planes(const Codes&, const Place&, const Plane*, int64_t, const Weights&, Ints, Floats*) {}

#endif

}  // namespace
