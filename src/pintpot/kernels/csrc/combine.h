// Sums of packed rows, each times a number of its own, without a row ever being numbers.
//
//     y[column] = sum over rows of x[row] * (scale[row, group] * code[row, column] + low[row, group])
//
// The scale goes to the x of its row and group, and the least numbers are summed once a group, so that one product is
// taken of each code. A row is cut into strips of as many bytes as a vector has lanes. A byte of a field of f bits
// holds 8 / f codes, one in each "plane" (see packing.h): the bytes of a strip are read once, and each plane is added
// to sums of its own over all rows. Only then are sums brought into the order of columns. Widths of several fields are
// sums of their fields.
#pragma once

#include "grid.h"

namespace {

constexpr int kMostPlanes = 8;
constexpr int kMostInputs = 4;

inline Floats floats_of_words(Words x) {
#if defined(PINTPOT_AVX512)
    return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(x));
#else
    return __builtin_convertvector(reinterpret_cast<Ints>(x), Floats);
#endif
}

// The numbers from[places[lane]]; places are below kLanes, and as many numbers can be read.
inline Floats pick(const float* from, Ints places) {
#if defined(PINTPOT_AVX512)
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(places), load<Floats>(from));
#elif defined(PINTPOT_AVX2)
    return _mm256_permutevar8x32_ps(load<Floats>(from), reinterpret_cast<__m256i>(places));
#elif defined(PINTPOT_NEON)
    return reinterpret_cast<Floats>(vqtbl1q_u8(load<uint8x16_t>(from), bytes_of(reinterpret_cast<Words>(places))));
#else
    Floats found;
    for (int i = 0; i < kLanes; ++i) found[i] = from[places[i]];
    return found;
#endif
}

// Some bytes of a row. What is beyond the end of a row or of a field's codes is put into a column that nobody reads.
struct PackedStrip {
    Words step, mask;          // of the field that each byte is of
    Floats factor, lead;       // 2^shift of that field; 1 in the lowest field, which brings the least numbers, else 0
    Ints place[kMostPlanes];   // group of each lane in each plane, less `first`
    Ints column[kMostPlanes];
    int32_t first[kMostPlanes];
    bool straight[kMostPlanes];  // the columns of all lanes follow one another
    int32_t planes;
    int64_t offset;            // of the first byte in its row
};

// How the rows of a matrix are packed: `parts` runs of `count` codes, with a scale for each `group` of a run.
struct Table {
    int64_t columns = 0, row_bytes = 0, part_bytes = 0, groups = 0, count = 0;
    bool uniform = true;  // no strip has two groups in one plane
    bool alike = true;    // all planes of a strip have the same groups
    Buffer<PackedStrip> strips;

    bool prepare(int64_t bits, int64_t parts, int64_t codes, int64_t group) {
        part_bytes = packed_bytes(codes, bits);
        row_bytes = parts * part_bytes;
        columns = parts * codes;
        groups = parts * ((codes + group - 1) / group);
        if (!strips.reserve(row_bytes / kLanes + 4)) return false;
        // Where a row is one run, a strip ends with its field: so never has more groups than lanes.
        int64_t ends[3] = {row_bytes, row_bytes, row_bytes};
        int fields = 0;
        if (parts == 1) {
            each_field(bits, codes, [&](int f, int, int64_t at) { ends[fields++] = at + field_bytes(codes, f); });
        }
        for (int64_t at = 0, field = 0; at < row_bytes; at = at + kLanes < ends[field] ? at + kLanes : ends[field++]) {
            fill(strips.get() + count++, bits, codes, group, at, ends[field]);
        }
        return true;
    }

   private:
    void fill(PackedStrip* strip, int64_t bits, int64_t codes, int64_t group, int64_t offset, int64_t end) {
        *strip = PackedStrip{};
        strip->offset = offset;
        strip->planes = 1;
        int32_t found[kMostPlanes][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t part = (offset + lane) / part_bytes, inside = (offset + lane) % part_bytes;
            for (int p = 0; p < kMostPlanes; ++p) {
                strip->column[p][lane] = static_cast<int32_t>(columns);
                found[p][lane] = -1;
            }
            each_field(bits, codes, [&](int field, int shift, int64_t start) {
                const int64_t width = field_bytes(codes, field);
                if (offset + lane >= end || inside < start || inside >= start + width) return;
                strip->step[lane] = static_cast<uint32_t>(field);
                strip->mask[lane] = (1u << field) - 1;
                strip->factor[lane] = static_cast<float>(1 << shift);
                strip->lead[lane] = shift == 0;
                strip->planes = 8 / field > strip->planes ? 8 / field : strip->planes;
                for (int p = 0; p * field < 8; ++p) {
                    const int64_t code = p * width + inside - start;
                    if (code >= codes) break;
                    strip->column[p][lane] = static_cast<int32_t>(part * codes + code);
                    found[p][lane] = static_cast<int32_t>(part * ((codes + group - 1) / group) + code / group);
                }
            });
        }
        for (int p = 0; p < strip->planes; ++p) place(strip, p, found[p], found[0]);
    }

    // Lanes of a plane that hold nothing are given to its least group.
    void place(PackedStrip* strip, int p, const int32_t* found, const int32_t* of_first_plane) {
        int32_t least = -1;
        bool straight = true;
        for (int lane = 0; lane < kLanes; ++lane) {
            if (found[lane] >= 0 && (least < 0 || found[lane] < least)) least = found[lane];
        }
        strip->first[p] = least < 0 ? 0 : least;
        for (int lane = 0; lane < kLanes; ++lane) {
            strip->place[p][lane] = found[lane] < 0 ? 0 : found[lane] - strip->first[p];
            uniform &= strip->place[p][lane] == 0;
            alike &= found[lane] < 0 || found[lane] == of_first_plane[lane];
            straight &= found[lane] >= 0 && strip->column[p][lane] == strip->column[p][0] + lane;
        }
        strip->straight[p] = straight;
    }
};

// Codes that are integers.
template <int Planes>
struct Integers {
    static constexpr int planes = Planes;
    static inline void read(const uint8_t* from, Words step, Words mask, Floats* codes) {
        Words bytes = words_of_bytes(from);
        for (int p = 0; p < Planes; ++p) {
            codes[p] = floats_of_words(bytes & mask);
            bytes >>= step;
        }
    }
};

// Codes of 8 bits in the floating-point format E4M3, whose numbers are those of a float16 with other bits times 2^8.
struct Float8 {
    static constexpr int planes = 1;
    static constexpr float unit = 256.0f;
    static inline Floats numbers_at(const uint8_t* from) {
#if defined(PINTPOT_AVX512) || defined(PINTPOT_AVX2) || defined(PINTPOT_NEON)
        const Halves bytes = halves_of_bytes(from);
        const Halves size = bytes & 0x7f;
        const Halves nan = reinterpret_cast<Halves>(size == 0x7f) & 0x7e00;
        const Halves bits = ((bytes & 0x80) << 8) | (size << 7) | nan;
#if defined(PINTPOT_AVX512)
        return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(PINTPOT_AVX2)
        return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#else
        return vcvt_f32_f16(reinterpret_cast<float16x4_t>(bits));
#endif
#else
        Floats found;
        for (int i = 0; i < kLanes; ++i) {
            const int size = from[i] & 0x7f, bits = (from[i] & 0x80) << 8 | (size == 0x7f ? 0x7fff : size << 7);
            found[i] = number(Float16{static_cast<uint16_t>(bits)});
        }
        return found;
#endif
    }
    static inline void read(const uint8_t* from, Words, Words, Floats* codes) { codes[0] = numbers_at(from); }
};

// The rows of a matrix, and what each of them is times: weights (inputs, rows, groups), x times scale.
struct Packed {
    const uint8_t* bytes;
    const uint8_t* end;  // of the array that they are in, beyond which nothing may be read
    int64_t rows, stride, groups;
    const float* weights;
    int64_t apart;  // from one input to the next
};

// The rows of which a whole vector can be read from a byte on: in the last ones it may reach beyond the array.
inline int64_t whole_rows(const Packed& packed, int64_t offset) {
    const int64_t last = packed.end - packed.bytes - offset - kLanes;
    const int64_t whole = last < 0 ? 0 : last / packed.stride + 1;
    return whole < packed.rows ? whole : packed.rows;
}

enum Groups { kUniform, kAlike, kMixed };

// The sums (planes, inputs) of one strip.
template <typename Coding, int Inputs, Groups Kind>
void add_strip(const Packed& packed, const PackedStrip& strip, Floats* sums) {
    constexpr int Planes = Coding::planes;
    // Enough sums side by side that none waits for the one before.
    constexpr int Chains = Planes * Inputs >= 4 ? 1 : 4 / (Planes * Inputs);
    const Words step = strip.step, mask = strip.mask;
    const int64_t stride = packed.stride, groups = packed.groups, apart = packed.apart;
    const uint8_t* from = packed.bytes + strip.offset;
    const float* weights = packed.weights;
    Floats totals[Chains][Planes][Inputs] = {};
    const auto add = [&](const uint8_t* bytes, Floats(&own)[Planes][Inputs]) {
        Floats codes[Planes];
        Coding::read(bytes, step, mask, codes);
        for (int i = 0; i < Inputs; ++i) {
            Floats weight = {};
            if (Kind == kAlike) weight = pick(weights + i * apart + strip.first[0], strip.place[0]);
            for (int p = 0; p < Planes; ++p) {
                if (Kind == kUniform) weight = all(weights[i * apart + strip.first[p]]);
                if (Kind == kMixed) weight = pick(weights + i * apart + strip.first[p], strip.place[p]);
                own[p][i] = fused(codes[p], weight, own[p][i]);
            }
        }
        weights += groups;
    };
    const int64_t rows = whole_rows(packed, strip.offset);
    int64_t row = 0;
    for (; row + Chains <= rows; row += Chains) {
        for (int c = 0; c < Chains; ++c, from += stride) add(from, totals[c]);
    }
    for (; row < packed.rows; ++row, from += stride) {
        uint8_t copy[kLanes] = {};
        const bool whole = packed.end - from >= kLanes;
        if (!whole) std::memcpy(copy, from, static_cast<size_t>(packed.end - from));
        add(whole ? from : copy, totals[0]);
    }
    for (int p = 0; p < Planes; ++p) {
        for (int i = 0; i < Inputs; ++i) {
            Floats total = totals[0][p][i];
            for (int c = 1; c < Chains; ++c) total += totals[c][p][i];
            sums[p * Inputs + i] = total;
        }
    }
}

using AddPacked = void (*)(const Packed&, const PackedStrip&, Floats*);

template <typename Coding, int Inputs>
AddPacked strip_of(const Table& table) {
    if (table.uniform) return add_strip<Coding, Inputs, kUniform>;
    return table.alike ? add_strip<Coding, Inputs, kAlike> : add_strip<Coding, Inputs, kMixed>;
}

template <typename Coding>
AddPacked strip_of(const Table& table, int64_t inputs) {
    if (inputs == 4) return strip_of<Coding, 4>(table);
    return inputs == 2 ? strip_of<Coding, 2>(table) : strip_of<Coding, 1>(table);
}

inline AddPacked strip_of(const Table& table, int planes, int64_t inputs) {
    if (planes == 1) return strip_of<Integers<1>>(table, inputs);
    if (planes == 2) return strip_of<Integers<2>>(table, inputs);
    return planes == 4 ? strip_of<Integers<4>>(table, inputs) : strip_of<Integers<8>>(table, inputs);
}

// Inputs whose sums are kept in registers together: 1, 2 or 4.
inline int64_t inputs_at_once(int planes, int64_t inputs) {
    const int64_t room = (kLanes == 16 ? 16 : 8) / planes;
    int64_t most = kMostInputs;
    while (most > 1 && (most > room || most > inputs)) most /= 2;
    return most;
}

// What one thread writes in between.
struct Weighed {
    Buffer<float> scale, low, weights, base;
    int64_t apart, base_apart;

    // For matrices of at most so many scales, and so many of them in a row.
    Weighed(int64_t scales, int64_t groups)
        : scale(scales + kLanes), low(scales + kLanes), weights(kMostInputs * (scales + kLanes)),
          base(kMostInputs * (groups + 2 * kLanes)), apart(scales + kLanes), base_apart(groups + 2 * kLanes) {
        if (!whole()) return;
        // The last vectors of a row reach beyond it.
        for (int64_t i = 0; i < scales + kLanes; ++i) scale.get()[i] = low.get()[i] = 0;
        for (int64_t i = 0; i < kMostInputs * base_apart; ++i) base.get()[i] = 0;
    }
    bool whole() const { return scale.get() && low.get() && weights.get() && base.get(); }

    // The weights and the least numbers' share of one input, for the scales that were read.
    void weigh(const float* x, int64_t rows, int64_t groups, bool lows, int64_t input) const {
        float* to = weights.get() + input * apart;
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t g = row * groups; g < (row + 1) * groups; g += kLanes) {
                store(to + g, load<Floats>(scale.get() + g) * x[row]);
            }
        }
        for (int64_t g = 0; lows && g < groups; g += kLanes) {
            Floats total = {};
            for (int64_t row = 0; row < rows; ++row) {
                total = fused(all(x[row]), load<Floats>(low.get() + row * groups + g), total);
            }
            store(base.get() + input * base_apart + g, total);
        }
    }
};

// Numbers in rows that are `apart`.
struct Rows {
    float* numbers;
    int64_t apart;
};

// Adds the sums of all rows to y (inputs, columns + 1), for x (inputs, rows); only of the first `bytes` of each row.
template <bool IsFloat>
inline void combine(const Table& table, Packed packed, int64_t bytes, const Weighed& weighed, Rows x, int64_t inputs,
                    bool lows, Rows y) {
    for (int64_t i = 0; i < inputs; ++i) weighed.weigh(x.numbers + i * x.apart, packed.rows, packed.groups, lows, i);
    Floats sums[kMostPlanes * kMostInputs];
    for (int64_t s = 0; s < table.count && table.strips.get()[s].offset < bytes; ++s) {
        const PackedStrip& strip = table.strips.get()[s];
        for (int64_t done = 0, some = 0; done < inputs; done += some) {
            some = inputs_at_once(strip.planes, inputs - done);
            packed.weights = weighed.weights.get() + done * weighed.apart;
            packed.apart = weighed.apart;
            (IsFloat ? strip_of<Float8>(table, some) : strip_of(table, strip.planes, some))(packed, strip, sums);
            for (int p = 0; p < strip.planes; ++p) {
                for (int64_t i = 0; i < some; ++i) {
                    const float* base = weighed.base.get() + (done + i) * weighed.base_apart;
                    const Floats share = strip.lead * pick(base + strip.first[p], strip.place[p]);
                    const Floats found = fused(sums[p * some + i], strip.factor, lows ? share : Floats{});
                    float* to = y.numbers + (done + i) * y.apart;
                    if (strip.straight[p]) {
                        to += strip.column[p][0];
                        store(to, load<Floats>(to) + found);
                        continue;
                    }
                    for (int lane = 0; lane < kLanes; ++lane) to[strip.column[p][lane]] += found[lane];
                }
            }
        }
    }
}

}  // namespace
