// Attention of a few queries to tokens whose keys were joined over the heads, mixed and reordered before they were
// packed, as in attend.py. Values are packed as in attend.h, and given back as they are packed: mixed.
//
// Sixteen tokens are taken together and turned, so that a channel of all of them is a vector (or several). Channels are
// then fetched in any order, sums of channels need nothing within vectors, and so do rotations, whose angles differ
// from token to token, and products with queries. Nothing passes from one token to another.
//
// The blocks of a sequence are cut into runs, which depend on the sizes alone; each run, with all heads, is computed by
// one thread, and the runs are put together in their order.
#pragma once

#include <limits>

#include "attend.h"
#include "hadamard.h"

namespace {

constexpr int64_t kTile = 16;  // tokens
constexpr int64_t kTileVectors = kTile / kLanes;

typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int64_t Longs __attribute__((vector_size(8 * kLanes)));

// The sine and the cosine of angles up to 2^30, to some units in the last place. Quarters of a circle are taken off in
// float64; the polynomials are those of Cephes' sinf and cosf (S. Moshier).
inline void wave(Floats angle, Floats* cosine, Floats* sine) {
    const Doubles wide = __builtin_convertvector(angle, Doubles);
    const Doubles shifted = wide * 0.63661977236758134 + 6755399441055744.0;
    const Doubles n = shifted - 6755399441055744.0;
    const Floats r = __builtin_convertvector(wide - n * 1.5707963267948966, Floats), z = r * r;
    Floats s = fused(all(-1.9515295891e-4f), z, all(8.3321608736e-3f));
    s = fused(s, z, all(-1.6666654611e-1f));
    s = fused(s * z, r, r);
    Floats c = fused(all(2.443315711809948e-5f), z, all(-1.388731625493765e-3f));
    c = fused(c, z, all(4.166664568298827e-2f));
    c = fused(c * z, z, fused(z, all(-0.5f), all(1.0f)));
    // The low bits of `shifted` are those of n.
    const Words quarter = __builtin_convertvector(reinterpret_cast<Longs>(shifted), Words);
    const Ints odd = (quarter & 1u) != 0;
    const Words negative_sine = (quarter & 2u) << 30, negative_cosine = ((quarter + 1u) & 2u) << 30;
    *sine = reinterpret_cast<Floats>(reinterpret_cast<Words>(odd ? c : s) ^ negative_sine);
    *cosine = reinterpret_cast<Floats>(reinterpret_cast<Words>(odd ? s : c) ^ negative_cosine);
}

// Of eight rows, in words of eight bytes, the upper halves of runs of 2 * shift bits against the lower ones of the rows
// that are as many bytes further on.
template <int shift>
inline void exchange_bytes(Octets* rows) {
    constexpr uint64_t lower = ~uint64_t{0} / ((uint64_t{1} << shift) + 1);
    for (int r = 0; r < 8; ++r) {
        if (r & (shift / 8)) continue;
        Octets& first = rows[r];
        Octets& second = rows[r + shift / 8];
        const Octets differ = ((first >> shift) ^ second) & lower;
        second ^= differ;
        first ^= differ << shift;
    }
}

// Codes of kTile tokens (kTile, width) as (width, kTile). Reads and writes whole vectors, and so beyond both.
inline void turn_codes(const uint8_t* codes, int64_t width, uint8_t* turned) {
    constexpr int64_t words = kOctets / 8;
    for (int64_t half = 0; half < kTile; half += 8) {
        for (int64_t place = 0; place < width; place += kOctets) {
            Octets rows[8];
            for (int64_t r = 0; r < 8; ++r) rows[r] = load<Octets>(codes + (half + r) * width + place);
            exchange_bytes<32>(rows);
            exchange_bytes<16>(rows);
            exchange_bytes<8>(rows);
            for (int64_t i = 0; i < 8; ++i) {
                for (int64_t word = 0; word < words; ++word) {
                    const uint64_t column = rows[i][word];
                    std::memcpy(turned + (place + 8 * word + i) * kTile + half, &column, 8);
                }
            }
        }
    }
}

// Where a channel is in a packed row.
struct Channel {
    int32_t place, group;
};

// How the tokens of a call are packed: heads and channels of a sequence, where channels are, and the fewest that are
// whole heads and whole blocks.
struct RotatedTokens {
    int64_t heads, width, groups, row_bytes, unit;
    Buffer<Channel> channels;  // (orders, width)
    GridValues values;

    // 0, or what the operation is to give back.
    int prepare(const PintpotAttendRotated& call) {
        const PintpotAttend& sizes = call.attend;
        heads = sizes.heads / call.sequences;
        width = heads * sizes.key_dim;
        groups = width / sizes.key_group;
        row_bytes = packed_bytes(width, sizes.bits);
        unit = sizes.key_dim;
        while (unit % call.key_block) unit *= 2;
        if (!channels.reserve(call.orders * width) || !values.prepare(sizes)) return 1;
        for (int64_t i = 0; i < call.orders * width; ++i) channels.get()[i].place = -1;
        for (int64_t i = 0; i < call.orders * width; ++i) {
            const int32_t channel = call.order[i], place = static_cast<int32_t>(i % width);
            if (channel < 0 || channel >= width) return 2;
            Channel& own = channels.get()[i - place + channel];
            if (own.place >= 0) return 2;
            own = {place, place / static_cast<int32_t>(sizes.key_group)};
        }
        return 0;
    }
};

// What one thread writes in between; channels and what belongs to them in rows of kTile tokens.
struct RotatedScratch {
    int64_t apart;               // from one query's scores to the next
    int64_t padded, group_rows;  // codes of a row in whole vectors, and numbers of all its groups
    Buffer<uint8_t> codes, turned;
    Buffer<float> scores, read, scale, low, cosine, sine, keys;
    Weighed weighed;

    RotatedScratch(const PintpotAttendRotated& call, const RotatedTokens& tokens, int64_t room)
        : apart((room + kTile - 1) / kTile * kTile + kTile),
          padded((tokens.width + kOctets - 1) / kOctets * kOctets), group_rows(tokens.groups * kTile),
          codes((padded + kOctets) * kTile), turned(padded * kTile),
          scores(tokens.heads * call.attend.rows * apart), read(group_rows), scale(group_rows), low(group_rows),
          cosine(call.waves * kTile), sine(call.waves * kTile), keys(tokens.unit * kTile),
          weighed(room * tokens.values.table.groups, tokens.values.table.groups) {
        if (!whole()) return;
        // Tokens beyond the last are computed too, from what was there before.
        std::memset(codes.get(), 0, static_cast<size_t>((padded + kOctets) * kTile));
        for (int64_t i = 0; i < group_rows; ++i) scale.get()[i] = low.get()[i] = 0;
    }
    bool whole() const {
        return weighed.whole() && scores.get() && read.get() && scale.get() && low.get() && cosine.get() &&
               sine.get() && keys.get() && codes.get() && turned.get();
    }
};

// A block of one sequence, with the positions of its tokens, if it has any, and the number of the first of them.
struct RotatedPart {
    const PintpotAttendBlock& block;
    const int32_t* positions;
    int64_t sequence, number;
};

// Scales or least numbers of some tokens, group by group.
inline void turn_scales(const PintpotAttend& call, const void* from, int64_t first, int64_t tokens, int64_t groups,
                        float* read, float* turned) {
    read_scales(call, from, first * groups, tokens * groups, read);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t g = 0; g < groups; ++g) turned[g * kTile + t] = read[t * groups + g];
    }
}

// Fetches the packed keys of `count` tokens of a block, from its token `first` on.
inline void read_tile(const PintpotAttend& call, const RotatedTokens& tokens, const RotatedPart& part, int64_t first,
                      int64_t count, const RotatedScratch& tile) {
    const PintpotAttendBlock& block = part.block;
    const int64_t row = part.sequence * block.room + first, width = tokens.width;
    unpack_part(block.keys + row * tokens.row_bytes, call.bits, width, 0, width, tile.codes.get(), count);
    turn_codes(tile.codes.get(), width, tile.turned.get());
    turn_scales(call, block.key_scale, row, count, tokens.groups, tile.read.get(), tile.scale.get());
    turn_scales(call, block.key_low, row, count, tokens.groups, tile.read.get(), tile.low.get());
}

// The waves of tokens of a block from `first` on, at their positions, or at their numbers where there are none.
inline void make_waves(const PintpotAttendRotated& call, const RotatedPart& part, int64_t first,
                       const RotatedScratch& tile) {
    alignas(64) float at[kTile] = {};
    const int32_t* positions = part.positions == nullptr ? nullptr : part.positions + part.sequence * part.block.room;
    for (int64_t t = first; t < first + kTile && t < part.block.tokens; ++t) {
        at[t - first] = static_cast<float>(positions == nullptr ? part.number + t : positions[t]);
    }
    for (int64_t i = 0; i < call.waves * kTile; i += kLanes) {
        Floats cosine, sine;
        wave(load<Floats>(at + i % kTile) * call.frequencies[i / kTile], &cosine, &sine);
        store(tile.cosine.get() + i, cosine * static_cast<float>(call.scaling));
        store(tile.sine.get() + i, sine * static_cast<float>(call.scaling));
    }
}

// The keys of a unit of channels, mixed back into their heads' own.
inline void restore_keys(const PintpotAttendRotated& call, const Channel* channels, int64_t count,
                         const RotatedScratch& tile) {
    for (int64_t c = 0; c < count; ++c) {
        const uint8_t* codes = tile.turned.get() + channels[c].place * kTile;
        const int64_t group = channels[c].group * kTile;
        for (int64_t i = 0; i < kTile; i += kLanes) {
            const Floats scale = load<Floats>(tile.scale.get() + group + i);
            const Floats low = load<Floats>(tile.low.get() + group + i);
            store(tile.keys.get() + c * kTile + i, fused(floats_of_bytes(codes + i), scale, low));
        }
    }
    mix_vectors(tile.keys.get(), count * kTile, kTile, call.key_block * kTile);
}

// Turns the first channels of a head by its tokens' waves.
inline void rotate_keys(float* keys, int64_t waves, const RotatedScratch& tile) {
    for (int64_t i = 0; i < waves * kTile; i += kLanes) {
        const Floats first = load<Floats>(keys + i), second = load<Floats>(keys + waves * kTile + i);
        const Floats cosine = load<Floats>(tile.cosine.get() + i), sine = load<Floats>(tile.sine.get() + i);
        store(keys + i, first * cosine - second * sine);
        store(keys + waves * kTile + i, second * cosine + first * sine);
    }
}

// Products of `Inputs` queries with the keys of a head, times a factor.
template <int Inputs>
inline void score_columns(const float* keys, int64_t dim, const float* query, float factor, Rows scores) {
    constexpr int Vectors = kTileVectors;
    // Enough sums side by side that none waits for the one before.
    constexpr int Chains = Inputs * Vectors >= 4 ? 1 : 4 / (Inputs * Vectors);
    Floats totals[Chains][Inputs][Vectors] = {};
    const auto add = [&](int64_t d, Floats(&own)[Inputs][Vectors]) {
        for (int i = 0; i < Inputs; ++i) {
            const Floats x = all(query[i * dim + d]);
            for (int v = 0; v < Vectors; ++v) {
                own[i][v] = fused(load<Floats>(keys + d * kTile + v * kLanes), x, own[i][v]);
            }
        }
    };
    int64_t d = 0;
    for (; d + Chains <= dim; d += Chains) {
        for (int c = 0; c < Chains; ++c) add(d + c, totals[c]);
    }
    for (; d < dim; ++d) add(d, totals[0]);
    for (int i = 0; i < Inputs; ++i) {
        for (int v = 0; v < Vectors; ++v) {
            for (int c = 1; c < Chains; ++c) totals[0][i][v] += totals[c][i][v];
            store(scores.numbers + i * scores.apart + v * kLanes, totals[0][i][v] * factor);
        }
    }
}

inline void score_head(const float* keys, int64_t dim, const float* query, int64_t inputs, float factor, Rows scores) {
    int64_t i = 0;
    const auto each = [&](auto score, int64_t count) {
        for (; i + count <= inputs; i += count) {
            score(keys, dim, query + i * dim, factor, Rows{scores.numbers + i * scores.apart, scores.apart});
        }
    };
    each(score_columns<4>, 4);
    each(score_columns<2>, 2);
    each(score_columns<1>, 1);
}

// Scores (heads, rows, tokens) of a block.
inline void score_block(const PintpotAttendRotated& call, const RotatedTokens& tokens, const RotatedPart& part,
                        const RotatedScratch& tile) {
    const PintpotAttend& sizes = call.attend;
    const int64_t dim = sizes.key_dim, width = tokens.width;
    const Channel* channels = tokens.channels.get() + (call.orders > 1 ? part.sequence * width : 0);
    const float* query = sizes.query + part.sequence * tokens.heads * sizes.rows * dim;
    const float factor = 1.0f / std::sqrt(static_cast<float>(call.key_block));
    for (int64_t t = 0; t < part.block.tokens; t += kTile) {
        read_tile(sizes, tokens, part, t, part.block.tokens - t < kTile ? part.block.tokens - t : kTile, tile);
        make_waves(call, part, t, tile);
        for (int64_t channel = 0; channel < width; channel += dim) {
            float* head = tile.keys.get() + channel % tokens.unit * kTile;
            if (channel % tokens.unit == 0) restore_keys(call, channels + channel, tokens.unit, tile);
            rotate_keys(head, call.waves, tile);
            const int64_t row = channel / dim * sizes.rows;
            score_head(head, dim, query + row * dim, sizes.rows, factor,
                       Rows{tile.scores.get() + row * tile.apart + t, tile.apart});
        }
    }
}

// Gives tokens of a block that are left out the least score: beside any other they weigh nothing.
inline void leave_out(const PintpotAttendRotated& call, const RotatedPart& part, float* scores) {
    for (int64_t i = 0; i < call.skips; ++i) {
        const int64_t token = call.skipped[part.sequence * call.skips + i] - part.number;
        if (token >= 0 && token < part.block.tokens) scores[token] = -std::numeric_limits<float>::max();
    }
}

inline void attend_part(const PintpotAttendRotated& call, const RotatedTokens& tokens, const RotatedPart& part,
                        const RotatedScratch& scratch, const Found& found) {
    const PintpotAttend& sizes = call.attend;
    const int64_t rows = tokens.heads * sizes.rows, apart = scratch.apart;
    score_block(call, tokens, part, scratch);
    for (int64_t row = 0; row < rows; ++row) {
        float* scores = scratch.scores.get() + row * apart;
        if (sizes.softcap > 0) restrain(scores, part.block.tokens, static_cast<float>(sizes.softcap));
        leave_out(call, part, scores);
        soften(scores, part.block.tokens, found, row, sizes.value_dim);
    }
    for (int64_t row = 0, inputs = 0; row < rows; row += inputs) {
        const int64_t left = sizes.rows - row % sizes.rows;
        inputs = left < kMostInputs ? left : kMostInputs;
        const Held held = {part.block, part.sequence * tokens.heads + row / sizes.rows};
        tokens.values.mix(sizes, held, scratch.weighed, Rows{scratch.scores.get() + row * apart, apart}, inputs,
                          Rows{found.out.numbers + row * found.out.apart, found.out.apart});
    }
}

constexpr int64_t kLeastBlocksOfRotatedRun = 2;
constexpr int64_t kEnoughRotatedRuns = 64;  // of all sequences together

int attend_rotated(const PintpotAttendRotated& call) {
    const PintpotAttend& sizes = call.attend;
    RotatedTokens tokens;
    if (const int status = tokens.prepare(call)) return status;
    int64_t room = 0, total = 0;
    Buffer<int64_t> numbers(sizes.count);
    if (!numbers.get()) return 1;
    for (int64_t b = 0; b < sizes.count; ++b) {
        room = sizes.blocks[b].room > room ? sizes.blocks[b].room : room;
        numbers.get()[b] = call.first + total;
        total += sizes.blocks[b].tokens;
    }
    const int64_t most = (sizes.count + kLeastBlocksOfRotatedRun - 1) / kLeastBlocksOfRotatedRun;
    const int64_t wanted = (kEnoughRotatedRuns + call.sequences - 1) / call.sequences;
    const int64_t runs = wanted < most ? wanted : most, rows = tokens.heads * sizes.rows;
    Partials partials;
    if (!partials.prepare(call.sequences * runs, rows, sizes.value_dim)) return 1;
    const int64_t work = sizes.heads * (sizes.rows + 4) * total * (sizes.key_dim + sizes.value_dim);
    bool failed = false;
    pintpot::parallel_for(
        call.sequences * runs, useful_threads(sizes.threads, work, kNumbersPerThread),
        [&](int64_t begin, int64_t end) {
            const RotatedScratch scratch(call, tokens, room);
            if (!scratch.whole()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            for (int64_t i = begin; i < end; ++i) {
                const Found& found = partials.found.get()[i];
                const int64_t run = i % runs;
                found.clear(rows);
                for (int64_t b = sizes.count * run / runs; b < sizes.count * (run + 1) / runs; ++b) {
                    attend_part(call, tokens, {sizes.blocks[b], call.positions[b], i / runs, numbers.get()[b]},
                                scratch, found);
                }
            }
        });
    if (failed) return 1;
    // All heads of a sequence are joined together.
    PintpotAttend joint = sizes;
    joint.rows = rows;
    for (int64_t s = 0; s < call.sequences; ++s) join(joint, partials.found.get() + s * runs, runs, s);
    return 0;
}

}  // namespace
