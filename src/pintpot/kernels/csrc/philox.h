// Philox4x32-10: random words that are a function of their place, as philox.py defines them and their order.
#pragma once

#include "simd.h"

namespace {

constexpr int64_t kRandomBlock = 64;

// The upper and lower halves of the products of words and one word.
inline void multiply_words(Words a, uint32_t b, Words* high, Words* low) {
    *low = a * b;
#if defined(PINTPOT_AVX512)
    const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
    const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    *high = reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#elif defined(PINTPOT_AVX2)
    const __m256i x = reinterpret_cast<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
    const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    *high = reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#elif defined(PINTPOT_NEON)
    const uint64x2_t first = vmull_n_u32(vget_low_u32(a), b), last = vmull_high_n_u32(a, b);
    *high = vuzp2q_u32(vreinterpretq_u32_u64(first), vreinterpretq_u32_u64(last));
#else
    for (int i = 0; i < kLanes; ++i) (*high)[i] = static_cast<uint32_t>((static_cast<uint64_t>(a[i]) * b) >> 32);
#endif
}

// The 64 words of a block.
inline void random_block(uint64_t block, uint64_t seed, uint64_t stream, uint32_t* to) {
    constexpr int counters = kRandomBlock / 4;
    Words lane = {};
    for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
    for (int part = 0; part < counters; part += kLanes) {
        // The counters of a block do not carry into their upper halves.
        const uint64_t place = block * counters + static_cast<uint64_t>(part);
        Words a = lane + static_cast<uint32_t>(place), b = Words{} + static_cast<uint32_t>(place >> 32);
        Words c = Words{} + static_cast<uint32_t>(stream), d = Words{} + static_cast<uint32_t>(stream >> 32);
        uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            Words first_high, first_low, second_high, second_low;
            multiply_words(a, 0xd2511f53u, &first_high, &first_low);
            multiply_words(c, 0xcd9e8d57u, &second_high, &second_low);
            a = second_high ^ b ^ low;
            c = first_high ^ d ^ high;
            b = second_low;
            d = first_low;
            low += 0x9e3779b9u;
            high += 0xbb67ae85u;
        }
        const Words words[] = {a, b, c, d};
        for (int word = 0; word < 4; ++word) store(to + word * counters + part, words[word]);
    }
}

}  // namespace
