// Attention of a few queries to packed keys and values, with an online softmax: blocks are read as they are stored.
//
// For each block the scores of a few queries, then their softmax relative to the greatest score so far, then the
// values. Keys in groups along tokens are rows of channels, values in groups along channels are rows of tokens: both
// are sums of packed rows (see combine.h). Keys that are packed token by token are products along their rows.
//
// A head's blocks are cut into runs, which depend on the sizes alone; each run is computed by one thread, and the runs
// are put together in their order.
#pragma once

#include "combine.h"

namespace {

// e^x for x that is not positive; 0 where it is below the normal numbers. The reduction and the polynomial are those of
// Cephes' expf (S. Moshier), correct to 2 units in the last place.
inline Floats exponential(Floats x) {
    const Floats magic = all(12582912.0f);
    const Floats shifted = fused(x, all(1.44269504f), magic);
    const Floats n = shifted - magic;
    const Floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    Floats p = fused(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
    p = fused(r, p, all(8.3334519073e-3f));
    p = fused(r, p, all(4.1665795894e-2f));
    p = fused(r, p, all(1.6666665459e-1f));
    p = fused(r, p, all(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
    // The low bits of `shifted` are those of n.
    const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
    return x < all(-87.0f) ? Floats{} : p * reinterpret_cast<Floats>(power);
}

inline Floats hyperbolic_tangent(Floats x) {
    const Floats small = exponential(magnitude(x) * -2.0f), size = (1.0f - small) / (1.0f + small);
    return x < Floats{} ? -size : size;
}

inline float exponential(float x) { return exponential(all(x))[0]; }

// One head of one block.
struct Held {
    const PintpotAttendBlock& block;
    int64_t head;
};

// All of an array as floats; none of them where there is no array.
inline void read_scales(const PintpotAttend& call, const void* from, int64_t start, int64_t count, float* to) {
    if (from == nullptr) return;
    with_type(call.scale_dtype, from, [&](const auto* numbers) { scales_of(numbers + start, count, to); });
}

// Values in groups along channels, codes that are integers.
struct GridValues {
    Table table;

    bool prepare(const PintpotAttend& call) { return table.prepare(call.bits, 1, call.value_dim, call.value_group); }

    void mix(const PintpotAttend& call, const Held& held, const Weighed& weighed, Rows weights, int64_t inputs,
             Rows out) const {
        const PintpotAttendBlock& block = held.block;
        const int64_t groups = table.groups, stride = table.row_bytes, first = held.head * block.room;
        read_scales(call, block.value_scale, first * groups, block.tokens * groups, weighed.scale.get());
        read_scales(call, block.value_low, first * groups, block.tokens * groups, weighed.low.get());
        const Packed packed = {block.values + first * stride, block.values + call.heads * block.room * stride,
                               block.tokens, stride, groups, nullptr, 0};
        combine<false>(table, packed, stride, weighed, weights, inputs, true, out);
    }
};

// The same, and keys in groups along tokens.
struct GridTokens {
    Table keys;
    GridValues values;

    bool prepare(const PintpotAttend& call, int64_t room) {
        return keys.prepare(call.bits, room / call.key_group, call.key_group, call.key_group) && values.prepare(call);
    }
    int64_t scales(const PintpotAttend& call, int64_t room) const {
        const int64_t of_keys = call.key_dim * keys.groups, of_values = room * values.table.groups;
        return of_keys > of_values ? of_keys : of_values;
    }
    int64_t groups() const { return keys.groups > values.table.groups ? keys.groups : values.table.groups; }

    void score(const PintpotAttend& call, const Held& held, const Weighed& weighed, Rows query, int64_t inputs,
               Rows scores) const {
        const PintpotAttendBlock& block = held.block;
        const int64_t groups = block.room / call.key_group, stride = groups * keys.part_bytes;
        const int64_t used = (block.tokens + call.key_group - 1) / call.key_group;
        const int64_t first = held.head * call.key_dim;
        read_scales(call, block.key_scale, first * groups, call.key_dim * groups, weighed.scale.get());
        read_scales(call, block.key_low, first * groups, call.key_dim * groups, weighed.low.get());
        for (int64_t i = 0; i < inputs; ++i) {
            for (int64_t t = 0; t < block.tokens; ++t) scores.numbers[i * scores.apart + t] = 0;
        }
        const Packed packed = {block.keys + first * stride, block.keys + call.heads * call.key_dim * stride,
                               call.key_dim, stride, groups, nullptr, 0};
        combine<false>(keys, packed, used * keys.part_bytes, weighed, query, inputs, true, scores);
    }

    void mix(const PintpotAttend& call, const Held& held, const Weighed& weighed, Rows weights, int64_t inputs,
             Rows out) const {
        values.mix(call, held, weighed, weights, inputs, out);
    }
};

// Scores of `Inputs` queries (padded with zeros to whole vectors) with tokens whose numbers are rows of E4M3.
template <int Inputs>
inline void score_rows(const Packed& rows, int64_t width, Rows query, const float* scale, Rows scores) {
    alignas(64) uint8_t last[kLanes] = {};
    for (int64_t row = 0; row < rows.rows; ++row) {
        const uint8_t* from = rows.bytes + row * rows.stride;
        Floats totals[Inputs] = {};
        for (int64_t j = 0; j < width; j += kLanes) {
            const bool whole = j + kLanes <= width;
            if (!whole) std::memcpy(last, from + j, static_cast<size_t>(width - j));
            const Floats key = Float8::numbers_at(whole ? from + j : last);
            for (int i = 0; i < Inputs; ++i) {
                totals[i] = fused(key, load<Floats>(query.numbers + i * query.apart + j), totals[i]);
            }
        }
        for (int i = 0; i < Inputs; ++i) {
            scores.numbers[i * scores.apart + row] = sum(totals[i]) * Float8::unit * scale[row];
        }
    }
}

// Codes of 8 bits in floating point, with a scale for each token of a head (`key_group` 1) or for all of them (0).
struct Float8Tokens {
    Table values;

    bool prepare(const PintpotAttend& call, int64_t) {
        const bool whole = values.prepare(8, 1, call.value_dim, call.value_dim);
        for (int64_t s = 0; s < values.count; ++s) values.strips.get()[s].factor *= Float8::unit;
        return whole;
    }
    int64_t scales(const PintpotAttend&, int64_t room) const { return room; }
    int64_t groups() const { return 1; }

    void read(const PintpotAttend& call, const Held& held, const void* from, float* scale) const {
        read_scales(call, from, held.head * (call.key_group ? held.block.room : 1),
                    call.key_group ? held.block.tokens : 1, scale);
        for (int64_t t = 1; !call.key_group && t < held.block.tokens; ++t) scale[t] = scale[0];
    }

    void score(const PintpotAttend& call, const Held& held, const Weighed& weighed, Rows query, int64_t inputs,
               Rows scores) const {
        const int64_t stride = call.key_dim;
        const uint8_t* bytes = held.block.keys + held.head * held.block.room * stride;
        const Packed rows = {bytes, nullptr, held.block.tokens, stride, 1, nullptr, 0};
        read(call, held, held.block.key_scale, weighed.scale.get());
        int64_t i = 0;
        const auto each = [&](auto score, int64_t count) {
            for (; i + count <= inputs; i += count) {
                score(rows, stride, Rows{query.numbers + i * query.apart, query.apart}, weighed.scale.get(),
                      Rows{scores.numbers + i * scores.apart, scores.apart});
            }
        };
        each(score_rows<4>, 4);
        each(score_rows<2>, 2);
        each(score_rows<1>, 1);
    }

    void mix(const PintpotAttend& call, const Held& held, const Weighed& weighed, Rows weights, int64_t inputs,
             Rows out) const {
        const PintpotAttendBlock& block = held.block;
        const int64_t stride = call.value_dim, first = held.head * block.room;
        read(call, held, block.value_scale, weighed.scale.get());
        const Packed packed = {block.values + first * stride, block.values + call.heads * block.room * stride,
                               block.tokens, stride, 1, nullptr, 0};
        combine<true>(values, packed, stride, weighed, weights, inputs, false, out);
    }
};

// What is known of a head's queries after some of the blocks.
struct Found {
    Rows out;  // (rows, value_dim + 1), relative to `top`
    float* top;
    float* norm;

    void clear(int64_t rows) const {
        for (int64_t row = 0; row < rows; ++row) {
            top[row] = -INFINITY;
            norm[row] = 0;
        }
        for (int64_t c = 0; c < rows * out.apart; ++c) out.numbers[c] = 0;
    }
};

// That of `count` runs of blocks, each with `rows` queries.
struct Partials {
    Buffer<float> numbers;
    Buffer<Found> found;

    bool prepare(int64_t count, int64_t rows, int64_t value_dim) {
        const int64_t apart = value_dim + 1, size = rows * (apart + 2);
        if (!numbers.reserve(count * size) || !found.reserve(count)) return false;
        for (int64_t i = 0; i < count; ++i) {
            float* own = numbers.get() + i * size;
            found.get()[i] = {{own, apart}, own + rows * apart, own + rows * (apart + 1)};
        }
        return true;
    }
};

inline int64_t padded_to_lanes(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Scores that do not go beyond a cap.
inline void restrain(float* scores, int64_t tokens, float cap) {
    for (int64_t t = 0; t < padded_to_lanes(tokens); t += kLanes) {
        store(scores + t, hyperbolic_tangent(load<Floats>(scores + t) / cap) * cap);
    }
}

// The scores of a block as weights relative to the greatest so far, and what has been found so far likewise.
inline void soften(float* scores, int64_t tokens, const Found& found, int64_t row, int64_t width) {
    const int64_t padded = padded_to_lanes(tokens);
    for (int64_t t = tokens; t < padded; ++t) scores[t] = -INFINITY;
    Floats most = all(found.top[row]);
    for (int64_t t = 0; t < padded; t += kLanes) {
        const Floats next = load<Floats>(scores + t);
        most = next > most ? next : most;
    }
    const float top = greatest(most), shrink = exponential(found.top[row] - top);
    Floats norm = {};
    for (int64_t t = 0; t < padded; t += kLanes) {
        const Floats weight = exponential(load<Floats>(scores + t) - top);
        store(scores + t, weight);
        norm += weight;
    }
    found.top[row] = top;
    found.norm[row] = found.norm[row] * shrink + sum(norm);
    float* out = found.out.numbers + row * found.out.apart;
    for (int64_t c = 0; c < width; ++c) out[c] *= shrink;
}

template <typename Tokens>
void attend_run(const PintpotAttend& call, const Tokens& tokens, const Weighed& weighed, Rows query, Rows scores,
                int64_t head, int64_t begin, int64_t end, const Found& found) {
    found.clear(call.rows);
    for (int64_t b = begin; b < end; ++b) {
        const Held held = {call.blocks[b], head};
        for (int64_t row = 0; row < call.rows; row += kMostInputs) {
            const int64_t inputs = call.rows - row < kMostInputs ? call.rows - row : kMostInputs;
            const Rows own = {query.numbers + (head * call.rows + row) * query.apart, query.apart};
            tokens.score(call, held, weighed, own, inputs, scores);
            for (int64_t i = 0; i < inputs; ++i) {
                float* numbers = scores.numbers + i * scores.apart;
                if (call.softcap > 0) restrain(numbers, held.block.tokens, static_cast<float>(call.softcap));
                soften(numbers, held.block.tokens, found, row + i, call.value_dim);
            }
            const Rows out = {found.out.numbers + row * found.out.apart, found.out.apart};
            tokens.mix(call, held, weighed, scores, inputs, out);
        }
    }
}

// The runs of a head in their order, as one.
inline void join(const PintpotAttend& call, const Found* runs, int64_t count, int64_t head) {
    for (int64_t row = 0; row < call.rows; ++row) {
        const int64_t place = head * call.rows + row;
        float top = runs[0].top[row], norm = 0;
        float* out = call.out + place * call.value_dim;
        for (int64_t r = 1; r < count; ++r) top = runs[r].top[row] > top ? runs[r].top[row] : top;
        for (int64_t c = 0; c < call.value_dim; ++c) out[c] = 0;
        for (int64_t r = 0; r < count; ++r) {
            const float shrink = exponential(runs[r].top[row] - top);
            const float* from = runs[r].out.numbers + row * runs[r].out.apart;
            norm += runs[r].norm[row] * shrink;
            for (int64_t c = 0; c < call.value_dim; ++c) out[c] += from[c] * shrink;
        }
        call.top[place] = top;
        call.norm[place] = norm;
    }
}

constexpr int64_t kLeastBlocksOfRun = 4;
constexpr int64_t kEnoughRuns = 128;  // of all heads together
constexpr int64_t kNumbersPerThread = 1 << 16;

template <typename Tokens>
int attend(const PintpotAttend& call) {
    int64_t room = 0, total = 0;
    for (int64_t b = 0; b < call.count; ++b) {
        room = call.blocks[b].room > room ? call.blocks[b].room : room;
        total += call.blocks[b].tokens;
    }
    const int64_t most = (call.count + kLeastBlocksOfRun - 1) / kLeastBlocksOfRun;
    const int64_t wanted = (kEnoughRuns + call.heads - 1) / call.heads, runs = wanted < most ? wanted : most;
    const int64_t wide = padded_to_lanes(call.key_dim), rows = call.heads * call.rows;
    Tokens tokens;
    Buffer<float> query(rows * wide);
    Partials partials;
    if (!tokens.prepare(call, room) || !query.get()) return 1;
    if (!partials.prepare(call.heads * runs, call.rows, call.value_dim)) return 1;
    for (int64_t i = 0; i < rows * wide; ++i) {
        query.get()[i] = i % wide < call.key_dim ? call.query[i / wide * call.key_dim + i % wide] : 0;
    }
    const int64_t work = call.heads * call.rows * total * (call.key_dim + call.value_dim);
    bool failed = false;
    pintpot::parallel_for(
        call.heads * runs, useful_threads(call.threads, work, kNumbersPerThread), [&](int64_t begin, int64_t end) {
            const int64_t width = padded_to_lanes(room) + kLanes;
            const Weighed weighed(tokens.scales(call, room), tokens.groups());
            const Buffer<float> scores(kMostInputs * width);
            if (!weighed.whole() || !scores.get()) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            for (int64_t i = begin; i < end; ++i) {
                const int64_t run = i % runs;
                attend_run(call, tokens, weighed, {query.get(), wide}, {scores.get(), width}, i / runs,
                           call.count * run / runs, call.count * (run + 1) / runs, partials.found.get()[i]);
            }
        });
    if (failed) return 1;
    for (int64_t head = 0; head < call.heads; ++head) join(call, partials.found.get() + head * runs, runs, head);
    return 0;
}

int attend_packed(const PintpotAttend& call) { return attend<GridTokens>(call); }

int attend_fp8(const PintpotAttend& call) { return attend<Float8Tokens>(call); }

}  // namespace
