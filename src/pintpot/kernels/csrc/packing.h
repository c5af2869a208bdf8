// Packing of integers of 1 to 8 bits. The layout is that of packing.py: a width is cut into fields of 4, 2 and 1 bits,
// stored one after the other; a field of f bits with m bytes holds in byte b the codes b, b + m, b + 2 m, ...
#pragma once

#include "parallel.h"
#include "pintpot.h"
#include "simd.h"

namespace {

inline int64_t field_bytes(int64_t count, int64_t field) { return (count * field + 7) / 8; }

// Calls `visit(field, shift, first byte)` for each field of a width, lowest bits of a code first.
template <typename Visit>
inline void each_field(int64_t bits, int64_t count, const Visit& visit) {
    if (bits == 8) return visit(8, 0, int64_t{0});
    int64_t start = 0;
    int shift = 0;
    for (int field = 4; field > 0; field /= 2) {
        if (!(bits & field)) continue;
        visit(field, shift, start);
        start += field_bytes(count, field);
        shift += field;
    }
}

inline int64_t packed_bytes(int64_t count, int64_t bits) {
    int64_t total = 0;
    each_field(bits, count, [&](int field, int, int64_t) { total += field_bytes(count, field); });
    return total;
}

#if defined(PINTPOT_AVX512)
constexpr int64_t kOctets = 64;
#elif defined(PINTPOT_AVX2)
constexpr int64_t kOctets = 32;
#else
constexpr int64_t kOctets = 16;
#endif
typedef uint8_t Octets __attribute__((vector_size(kOctets)));
typedef uint16_t Pairs __attribute__((vector_size(kOctets)));

// (x >> right & mask) << left of each byte. Shifts are of two bytes at once; the mask drops what comes from the other,
// and nothing is shifted out on the left.
inline Octets field_of(Octets x, int right, int mask, int left) {
    const Octets kept = reinterpret_cast<Octets>(reinterpret_cast<Pairs>(x) >> right) & static_cast<uint8_t>(mask);
    return left ? reinterpret_cast<Octets>(reinterpret_cast<Pairs>(kept) << left) : kept;
}

// One run of a field, from one side to the other: `to = to * keeps | field of from`.
inline void move_field(const uint8_t* from, int64_t count, int right, int mask, int left, bool keeps, uint8_t* to) {
    int64_t i = 0;
    for (; i + kOctets <= count; i += kOctets) {
        Octets found = field_of(load<Octets>(from + i), right, mask, left);
        if (keeps) found |= load<Octets>(to + i);
        store(to + i, found);
    }
    for (; i < count; ++i) {
        const int found = ((from[i] >> right) & mask) << left;
        to[i] = static_cast<uint8_t>(keeps ? to[i] | found : found);
    }
}

// The codes `begin` to `end` of a row of `count`.
inline void unpack_part(const uint8_t* packed, int64_t bits, int64_t count, int64_t begin, int64_t end,
                        uint8_t* codes) {
    each_field(bits, count, [&](int field, int shift, int64_t start) {
        const int64_t width = field_bytes(count, field);
        for (int64_t plane = begin / width; plane * field < 8 && plane * width < end; ++plane) {
            const int64_t first = plane * width > begin ? plane * width : begin;
            const int64_t last = (plane + 1) * width < end ? (plane + 1) * width : end;
            move_field(packed + start + first - plane * width, last - first, static_cast<int>(plane) * field,
                       (1 << field) - 1, shift, shift > 0, codes + first - begin);
        }
    });
}

inline void unpack_row(const uint8_t* packed, int64_t bits, int64_t count, uint8_t* codes) {
    unpack_part(packed, bits, count, 0, count, codes);
}

inline void pack_row(const uint8_t* codes, int64_t bits, int64_t count, uint8_t* packed) {
    std::memset(packed, 0, static_cast<size_t>(packed_bytes(count, bits)));
    each_field(bits, count, [&](int field, int shift, int64_t start) {
        const int64_t width = field_bytes(count, field);
        const int mask = (1 << field) - 1;
        for (int64_t plane = 0; plane * field < 8 && plane * width < count; ++plane) {
            const int64_t from = plane * width;
            const int64_t run = count - from < width ? count - from : width;
            move_field(codes + from, run, shift, mask, static_cast<int>(plane) * field, plane > 0, packed + start);
        }
    });
}

// Below this many codes a second thread costs more than it gives.
constexpr int64_t kCodesPerThread = 1 << 15;

inline int64_t useful_threads(int64_t threads, int64_t work, int64_t work_per_thread) {
    const int64_t useful = work / work_per_thread;
    return useful < 1 ? 1 : (useful < threads ? useful : threads);
}

void unpack(const PintpotPacking& call) {
    if (call.count == 0) return;
    const int64_t bytes = packed_bytes(call.count, call.bits);
    const int64_t threads = useful_threads(call.threads, call.rows * call.count, kCodesPerThread);
    pintpot::parallel_for(call.rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            unpack_row(call.packed + row * bytes, call.bits, call.count, call.codes + row * call.count);
        }
    });
}

void pack(const PintpotPacking& call) {
    if (call.count == 0) return;
    const int64_t bytes = packed_bytes(call.count, call.bits);
    const int64_t threads = useful_threads(call.threads, call.rows * call.count, kCodesPerThread);
    pintpot::parallel_for(call.rows, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            pack_row(call.codes + row * call.count, call.bits, call.count, call.packed + row * bytes);
        }
    });
}

}  // namespace
