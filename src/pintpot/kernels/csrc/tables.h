// Sources of weights that are looked up (see tiles.h): codebooks and ternary numbers.
#pragma once

#include "tiles.h"

namespace {

typedef float Four __attribute__((vector_size(16)));

// One codebook in float32, its entries filled up with zeros to a width that is copied at once, and the indices into it.
struct Book {
    const uint8_t* index = nullptr;
    const uint8_t* high = nullptr;
    int64_t bits = 0, stride = 0;
    Buffer<float> entries;

    // Numbers are rounded to the dtype `rounded`, as those of the definition are.
    bool prepare(const PintpotBook& from, int64_t dtype, int64_t vector, int64_t rounded) {
        index = from.index;
        high = from.high;
        bits = from.bits;
        stride = vector < 3 ? vector : (vector < 5 ? 4 : rounded_up(vector, 8));
        const int64_t count = int64_t{1} << bits;
        if (!entries.reserve(count * stride)) return false;
        std::memset(entries.get(), 0, sizeof(float) * static_cast<size_t>(count * stride));
        with_type(dtype, from.entries, [&](const auto* all) {
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t k = 0; k < vector; ++k) entries.get()[i * stride + k] = number(all[i * vector + k]);
            }
        });
        round_floats(entries.get(), count * stride, rounded);
        return true;
    }

    // The indices of the vectors `begin` to `end` of a row of `count`.
    void read(int64_t row, int64_t count, int64_t begin, int64_t end, uint8_t* codes, uint16_t* to) const {
        const uint8_t* low = codes_of(index, bits < 8 ? bits : 8, row, count, begin, end, codes);
        widen(low, end - begin, to);
        if (bits <= 8) return;
        const uint8_t* top = codes_of(high, bits - 8, row, count, begin, end, codes);
        int64_t i = 0;
        for (; i + kLanes <= end - begin; i += kLanes) {
            store(to + i, load<Halves>(to + i) | halves_of_bytes(top + i) << 8);
        }
        for (; i < end - begin; ++i) to[i] = static_cast<uint16_t>(to[i] | top[i] << 8);
    }

   private:
    static const uint8_t* codes_of(const uint8_t* packed, int64_t bits, int64_t row, int64_t count, int64_t begin,
                                   int64_t end, uint8_t* codes) {
        const uint8_t* from = packed + row * packed_bytes(count, bits);
        if (bits == 8) return from + begin;
        unpack_part(from, bits, count, begin, end, codes);
        return codes;
    }

    static void widen(const uint8_t* from, int64_t count, uint16_t* to) {
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            store(to + i, halves_of_bytes(from + i));
        }
        for (; i < count; ++i) to[i] = from[i];
    }
};

// Entries of one or two codebooks, `vector` numbers each, written one after the other. `Width` floats are copied at a
// time, and what is beyond an entry is overwritten by the next; `Long` entries take more than one copy.
template <int Width, bool Long, bool Two>
inline void write_entries(const Book& book, const uint16_t* index, const Book& other, const uint16_t* second,
                          int64_t count, int64_t vector, float* to) {
    const int64_t stride = Long ? book.stride : Width;
    const float* entries = book.entries.get();
    const float* others = other.entries.get();
#pragma GCC unroll 4
    for (int64_t n = 0; n < count; ++n, to += vector) {
        const float* from = entries + index[n] * stride;
        const float* rest = Two ? others + second[n] * stride : nullptr;
        for (int64_t part = 0; part < (Long ? stride : Width); part += Width) {
            if (!Two) {
                std::memcpy(to + part, from + part, sizeof(float) * Width);
            } else if (Width < 4) {
                for (int k = 0; k < Width; ++k) to[part + k] = from[part + k] + rest[part + k];
            } else {
                for (int k = 0; k < Width; k += 4) {
                    store(to + part + k, load<Four>(from + part + k) + load<Four>(rest + part + k));
                }
            }
        }
    }
}

// Entries of one number, few enough to be held in registers: a vector of them at a time. Gives how many it did.
inline int64_t write_few(const float* entries, int64_t bits, const uint16_t* index, int64_t count, float* to) {
    int64_t i = 0;
#if defined(PINTPOT_AVX512)
    if (bits > 6) return 0;
    __m512 held[4] = {};
    std::memcpy(held, entries, sizeof(float) << bits);
    for (; i + 16 <= count; i += 16) {
        const __m512i codes = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + i)));
        __m512 found = _mm512_permutex2var_ps(held[0], codes, held[1]);
        if (bits > 5) {
            const __mmask16 upper = _mm512_test_epi32_mask(codes, _mm512_set1_epi32(32));
            found = _mm512_mask_mov_ps(found, upper, _mm512_permutex2var_ps(held[2], codes, held[3]));
        }
        _mm512_storeu_ps(to + i, found);
    }
#elif defined(PINTPOT_AVX2)
    if (bits > 4) return 0;
    __m256 held[2] = {};
    std::memcpy(held, entries, sizeof(float) << bits);
    for (; i + 8 <= count; i += 8) {
        const __m256i codes = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index + i)));
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        _mm256_storeu_ps(to + i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(held[0], codes),
                                                  _mm256_permutevar8x32_ps(held[1], codes), upper));
    }
#elif defined(PINTPOT_NEON)
    if (bits > 4) return 0;
    float held[16] = {};
    std::memcpy(held, entries, sizeof(float) << bits);
    const uint8x16x4_t table = vld1q_u8_x4(reinterpret_cast<const uint8_t*>(held));
    for (; i + 4 <= count; i += 4) store(to + i, vqtbl4q_u8(table, bytes_of(vmovl_u16(vld1_u16(index + i)))));
#else
    (void)entries, (void)bits, (void)index, (void)count, (void)to;
#endif
    return i;
}

class CodebookSource {
   public:
    explicit CodebookSource(const PintpotCodebook& from)
        : columns_(from.columns), rows_(from.rows), vector_(from.vector),
          count_((from.columns + from.vector - 1) / from.vector), two_(from.residual.index != nullptr) {}

    bool prepare(const PintpotCodebook& from, int64_t rounded) {
        return main_.prepare(from.main, from.dtype, vector_, rounded) &&
               (!two_ || residual_.prepare(from.residual, from.dtype, vector_, rounded));
    }

    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    int64_t step() const { return vector_; }

    struct Scratch {
        Buffer<uint8_t> codes;
        Buffer<uint16_t> main, residual;
        // The last vector of a row is written whole, and has a place of its own.
        Buffer<float> last;

        Scratch(const CodebookSource& source, int64_t columns)
            : codes(columns / source.vector_ + 1), main(columns / source.vector_ + 1),
              residual(columns / source.vector_ + 1), last(source.vector_ + kOverhang) {}
        bool whole() const { return codes.get() && main.get() && residual.get() && last.get(); }
    };

    template <int Rows>
    void read(Scratch& scratch, int64_t row, int64_t begin, int64_t end, float* to, int64_t stride) const {
        for (int r = 0; r < Rows; ++r) read_row(scratch, row + r, begin, end, to + r * stride);
    }

   private:
    void read_row(Scratch& scratch, int64_t row, int64_t begin, int64_t end, float* to) const {
        const int64_t first = begin / vector_, whole = end / vector_;
        const int64_t stop = (end + vector_ - 1) / vector_;
        main_.read(row, count_, first, stop, scratch.codes.get(), scratch.main.get());
        if (two_) residual_.read(row, count_, first, stop, scratch.codes.get(), scratch.residual.get());
        write(scratch, 0, whole - first, to);
        if (stop > whole) {
            write(scratch, whole - first, 1, scratch.last.get());
            std::memcpy(to + whole * vector_ - begin, scratch.last.get(),
                        sizeof(float) * static_cast<size_t>(end - whole * vector_));
        }
    }

    void write(const Scratch& scratch, int64_t first, int64_t count, float* to) const {
        int64_t done = 0;
        if (vector_ == 1 && !two_) {
            done = write_few(main_.entries.get(), main_.bits, scratch.main.get() + first, count, to);
        }
        const auto all = two_ ? writer<true>() : writer<false>();
        all(main_, scratch.main.get() + first + done, residual_, scratch.residual.get() + first + done, count - done,
            vector_, to + done * vector_);
    }

    using Writer = void (*)(const Book&, const uint16_t*, const Book&, const uint16_t*, int64_t, int64_t, float*);

    template <bool Two>
    Writer writer() const {
        if (vector_ < 3) return vector_ == 1 ? write_entries<1, false, Two> : write_entries<2, false, Two>;
        if (vector_ < 5) return write_entries<4, false, Two>;
        return vector_ < 9 ? write_entries<8, false, Two> : write_entries<8, true, Two>;
    }

    int64_t columns_, rows_, vector_, count_;
    bool two_;
    Book main_, residual_;
};

class TernarySource {
   public:
    // Scales are rounded to the dtype `rounded`, as those of the definition are.
    TernarySource(const PintpotTernary& from, int64_t rounded)
        : from_(from), rounded_(rounded), bytes_((from.columns + from.per_byte - 1) / from.per_byte),
          groups_((from.columns + from.group - 1) / from.group) {
        for (int byte = 0; byte < 256; ++byte) {
            for (int i = 0, rest = byte; i < 8; ++i, rest /= 3) digits_[byte][i] = static_cast<uint8_t>(rest % 3);
        }
    }

    int64_t rows() const { return from_.rows; }
    int64_t columns() const { return from_.columns; }
    int64_t step() const { return from_.per_byte; }

    struct Scratch {
        Buffer<uint8_t> codes;
        Buffer<float> scale;

        Scratch(const TernarySource& source, int64_t columns)
            : codes(columns + 16), scale(source.groups_) {}
        bool whole() const { return codes.get() && scale.get(); }
    };

    template <int Rows>
    void read(Scratch& scratch, int64_t row, int64_t begin, int64_t end, float* to, int64_t stride) const {
        for (int r = 0; r < Rows; ++r) read_row(scratch, row + r, begin, end, to + r * stride);
    }

   private:
    void read_row(Scratch& scratch, int64_t row, int64_t begin, int64_t end, float* to) const {
        const int64_t group = from_.group;
        uint8_t* codes = scratch.codes.get();
        const int64_t first_byte = begin / from_.per_byte;
        const uint8_t* packed = from_.packed + row * bytes_ + first_byte;
        take_apart(packed, (end + from_.per_byte - 1) / from_.per_byte - first_byte, codes);
        const int64_t first = begin / group, last = (end - 1) / group;
        with_type(from_.dtype, from_.scale, [&](const auto* scale) {
            for (int64_t g = first; g <= last; ++g) scratch.scale.get()[g - first] = number(scale[row * groups_ + g]);
        });
        round_floats(scratch.scale.get(), last + 1 - first, rounded_);
        for (int64_t g = first, i = begin; g <= last; ++g) {
            const float scale = scratch.scale.get()[g - first];
            const int64_t stop = (g + 1) * group < end ? (g + 1) * group : end;
            for (; i + kLanes <= stop; i += kLanes) {
                store(to + i - begin, (floats_of_bytes(codes + i - begin) - 1.0f) * scale);
            }
            for (; i < stop; ++i) to[i - begin] = (static_cast<float>(codes[i - begin]) - 1.0f) * scale;
        }
    }

    // The digits of some bytes, and up to seven bytes more.
    void take_apart(const uint8_t* packed, int64_t count, uint8_t* to) const {
        if (from_.per_byte == 5) {
            for (int64_t b = 0; b < count; ++b) std::memcpy(to + 5 * b, digits_[packed[b]], 8);
            return;
        }
        int64_t b = 0;
        for (; b + kLanes <= count; b += kLanes) {
            const Words x = words_of_bytes(packed + b);
            store(to + 4 * b, (x | x << 6 | x << 12 | x << 18) & 0x03030303u);
        }
        for (; b < count; ++b) {
            for (int i = 0; i < 4; ++i) to[4 * b + i] = packed[b] >> 2 * i & 3;
        }
    }

    const PintpotTernary& from_;
    int64_t rounded_, bytes_, groups_;
    // Of base 3, by the byte.
    uint8_t digits_[256][8];
};

int codebook_matmul(const PintpotCodebookCall& call) {
    CodebookSource source(call.weight);
    return source.prepare(call.weight, kFloat32) ? multiply_source(source, call.operand) : 1;
}

int codebook_matmul_transposed(const PintpotCodebookCall& call) {
    CodebookSource source(call.weight);
    return source.prepare(call.weight, kFloat32) ? multiply_transposed(source, call.operand) : 1;
}

int codebook_decode(const PintpotCodebookCall& call) {
    CodebookSource source(call.weight);
    return source.prepare(call.weight, call.operand.dtype) ? decode_source(source, call.operand) : 1;
}

int ternary_matmul(const PintpotTernaryCall& call) {
    return multiply_source(TernarySource(call.weight, kFloat32), call.operand);
}

int ternary_decode(const PintpotTernaryCall& call) {
    return decode_source(TernarySource(call.weight, call.operand.dtype), call.operand);
}

}  // namespace
