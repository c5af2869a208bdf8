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
typedef uint64_t Octets __attribute__((vector_size(kOctets)));
typedef uint64_t Sixteen __attribute__((vector_size(16)));

// A byte in each byte of a word.
inline uint64_t spread(int byte) { return static_cast<uint64_t>(byte) * 0x0101010101010101u; }

// (x >> right & mask) << left of each byte, for a mask that is spread. Whole words are shifted; the mask drops what
// comes from the next byte, and nothing is shifted out on the left.
template <typename Words>
inline Words field_of(Words x, int right, uint64_t mask, int left) {
    return static_cast<Words>(((x >> right) & mask) << left);
}

// One run of a field, from one side to the other, for some rows of as many bytes on each side.
struct Move {
    int64_t rows, from_stride, to_stride;
    int right, mask, left;
    bool keeps;  // `to = to | field of from`, and not only the field
};

// From byte `begin` of each row as many whole words as there are; where they end. Rows are the inner loop, since where
// there are many they are short.
template <typename Words>
inline int64_t move_words(const Move move, const uint8_t* from, int64_t begin, int64_t end, uint8_t* to) {
    constexpr int64_t size = sizeof(Words);
    const int64_t words = (end - begin) / size;
    if (words == 0) return begin;
    const uint64_t mask = spread(move.mask);
    for (int64_t i = begin; i < begin + words * size; i += size) {
        for (int64_t row = 0; row < move.rows; ++row) {
            Words found = field_of(load<Words>(from + row * move.from_stride + i), move.right, mask, move.left);
            if (move.keeps) found |= load<Words>(to + row * move.to_stride + i);
            store(to + row * move.to_stride + i, found);
        }
    }
    return begin + words * size;
}

inline void move_field(const Move& move, const uint8_t* from, int64_t count, uint8_t* to) {
    int64_t done = move_words<Octets>(move, from, 0, count, to);
    done = move_words<Sixteen>(move, from, done, count, to);
    done = move_words<uint64_t>(move, from, done, count, to);
    done = move_words<uint32_t>(move, from, done, count, to);
    move_words<uint8_t>(move, from, done, count, to);
}

// The codes `begin` to `end` of some rows of `count`, one row after the other.
inline void unpack_part(const uint8_t* packed, int64_t bits, int64_t count, int64_t begin, int64_t end, uint8_t* codes,
                        int64_t rows = 1) {
    const int64_t bytes = packed_bytes(count, bits);
    each_field(bits, count, [&](int field, int shift, int64_t start) {
        const int64_t width = field_bytes(count, field);
        for (int64_t plane = begin / width; plane * field < 8 && plane * width < end; ++plane) {
            const int64_t first = plane * width > begin ? plane * width : begin;
            const int64_t last = (plane + 1) * width < end ? (plane + 1) * width : end;
            const Move move = {rows, bytes, end - begin, static_cast<int>(plane) * field, (1 << field) - 1,
                               shift, shift > 0};
            move_field(move, packed + start + first - plane * width, last - first, codes + first - begin);
        }
    });
}

inline void unpack_row(const uint8_t* packed, int64_t bits, int64_t count, uint8_t* codes) {
    unpack_part(packed, bits, count, 0, count, codes);
}

inline void pack_rows(const uint8_t* codes, int64_t bits, int64_t count, uint8_t* packed, int64_t rows) {
    const int64_t bytes = packed_bytes(count, bits);
    std::memset(packed, 0, static_cast<size_t>(rows * bytes));
    each_field(bits, count, [&](int field, int shift, int64_t start) {
        const int64_t width = field_bytes(count, field);
        const int mask = (1 << field) - 1;
        for (int64_t plane = 0; plane * field < 8 && plane * width < count; ++plane) {
            const int64_t from = plane * width;
            const int64_t run = count - from < width ? count - from : width;
            const Move move = {rows, count, bytes, shift, mask, static_cast<int>(plane) * field, plane > 0};
            move_field(move, codes + from, run, packed + start);
        }
    });
}

// Below this many codes a second thread costs more than it gives.
constexpr int64_t kCodesPerThread = 1 << 15;

inline int64_t useful_threads(int64_t threads, int64_t work, int64_t work_per_thread) {
    const int64_t useful = work / work_per_thread;
    return useful < 1 ? 1 : (useful < threads ? useful : threads);
}

// Short rows are packed and unpacked together, as many as stay in the processor's first cache.
constexpr int64_t kCodesAtOnce = 4096;

// Calls `work(first row, rows)` for rows that are taken together.
template <typename Work>
inline void each_batch(int64_t begin, int64_t end, int64_t count, const Work& work) {
    const int64_t most = count < kCodesAtOnce ? kCodesAtOnce / count : 1;
    for (int64_t row = begin; row < end; row += most) work(row, end - row < most ? end - row : most);
}

int unpack(const PintpotPacking& call) {
    if (call.count == 0) return 0;
    const int64_t bytes = packed_bytes(call.count, call.bits);
    const int64_t threads = useful_threads(call.threads, call.rows * call.count, kCodesPerThread);
    pintpot::parallel_for(call.rows, threads, [&](int64_t begin, int64_t end) {
        each_batch(begin, end, call.count, [&](int64_t row, int64_t rows) {
            unpack_part(call.packed + row * bytes, call.bits, call.count, 0, call.count, call.codes + row * call.count,
                        rows);
        });
    });
    return 0;
}

int pack(const PintpotPacking& call) {
    if (call.count == 0) return 0;
    const int64_t bytes = packed_bytes(call.count, call.bits);
    const int64_t threads = useful_threads(call.threads, call.rows * call.count, kCodesPerThread);
    pintpot::parallel_for(call.rows, threads, [&](int64_t begin, int64_t end) {
        each_batch(begin, end, call.count, [&](int64_t row, int64_t rows) {
            pack_rows(call.codes + row * call.count, call.bits, call.count, call.packed + row * bytes, rows);
        });
    });
    return 0;
}

// code * scale + low for the codes `begin` to `end` of a row.
template <typename Number>
inline void restore_part(const uint8_t* codes, const Number* scale, const Number* low, int64_t group, int64_t begin,
                         int64_t end, float* to) {
    for (int64_t g = begin / group, start = begin; start < end; ++g) {
        const int64_t stop = (g + 1) * group < end ? (g + 1) * group : end;
        const float step = number(scale[g]), least = number(low[g]);
        for (; start + kLanes <= stop; start += kLanes) {
            store(to + start, floats_of_bytes(codes + start - begin) * step + least);
        }
        for (; start < stop; ++start) to[start] = static_cast<float>(codes[start - begin]) * step + least;
    }
}

template <typename Number>
inline void restore_rows(const PintpotRestore& call, const Number* scale, const Number* low, int64_t row,
                         int64_t rows) {
    const int64_t count = call.count, groups = (count + call.group - 1) / call.group;
    const uint8_t* packed = call.packed + row * packed_bytes(count, call.bits);
    alignas(64) uint8_t codes[kCodesAtOnce];
    for (int64_t begin = 0; begin < count; begin += kCodesAtOnce) {
        const int64_t end = count - begin < kCodesAtOnce ? count : begin + kCodesAtOnce;
        unpack_part(packed, call.bits, count, begin, end, codes, rows);
        // Whole rows of whole groups are as one long row.
        const bool joined = end - begin == count && count % call.group == 0;
        const int64_t parts = joined ? 1 : rows, last = joined ? rows * count : end;
        for (int64_t r = 0; r < parts; ++r) {
            const int64_t first = (row + r) * groups;
            restore_part(codes + r * (end - begin), scale + first, low + first, call.group, begin, last,
                         call.output + (row + r) * count);
        }
    }
}

int restore(const PintpotRestore& call) {
    if (call.count == 0) return 0;
    const int64_t threads = useful_threads(call.threads, call.rows * call.count, kCodesPerThread);
    with_type(call.dtype, call.scale, [&](const auto* scale) {
        const auto* low = static_cast<decltype(scale)>(call.low);
        pintpot::parallel_for(call.rows, threads, [&](int64_t begin, int64_t end) {
            each_batch(begin, end, call.count,
                       [&](int64_t row, int64_t rows) { restore_rows(call, scale, low, row, rows); });
        });
    });
    return 0;
}

}  // namespace
