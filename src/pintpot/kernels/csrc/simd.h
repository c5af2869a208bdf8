// Vectors of floats as wide as the instruction set allows, and conversions of stored numbers.
//
// Arithmetic is that of the compiler's own vector types, which also serve NEON; only what they lack is written with
// intrinsics. The compiler must not contract products and sums (-ffp-contract=off): where one rounding is meant, it
// says `fused`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define PINTPOT_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PINTPOT_AVX2 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define PINTPOT_NEON 1
#if defined(__ARM_FEATURE_DOTPROD)
#define PINTPOT_DOTPROD 1
#endif
#endif

namespace {

#if defined(PINTPOT_AVX512)
constexpr int kLanes = 16;
#elif defined(PINTPOT_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename Vector>
inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

template <typename Vector>
inline void store(void* to, Vector vector) {
    std::memcpy(to, &vector, sizeof(vector));
}

// (A sum with zero would have to be computed: it makes 0 of -0.)
inline Floats all(float value) { return value - Floats{}; }

inline Floats square_root(Floats x) {
#if defined(PINTPOT_AVX512)
    return _mm512_sqrt_ps(x);
#elif defined(PINTPOT_AVX2)
    return _mm256_sqrt_ps(x);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(x);
#elif defined(PINTPOT_NEON)
    return vsqrtq_f32(x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// a * b + c with one rounding where the processor has that operation.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(PINTPOT_AVX512)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(PINTPOT_AVX2)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(PINTPOT_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

inline Floats magnitude(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(x) & 0x7fffffffu); }

// Halves are added to one another until one number is left, in the same order everywhere.
inline float sum(Floats x) {
#if defined(PINTPOT_AVX512)
    return _mm512_reduce_add_ps(x);
#elif defined(PINTPOT_AVX2)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) x[i] += x[i + width];
    }
    return x[0];
#endif
}

inline float greatest(Floats x) {
    float most = x[0];
    for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
    return most;
}

inline Halves halves_of_bytes(const uint8_t* from) {
#if defined(PINTPOT_NEON)
    return vget_low_u16(vmovl_u8(vcreate_u8(load<uint32_t>(from))));
#else
    return __builtin_convertvector(load<Bytes>(from), Halves);
#endif
}

inline Floats floats_of_bytes(const uint8_t* from) {
#if defined(PINTPOT_AVX512)
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(PINTPOT_AVX2)
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(PINTPOT_NEON)
    return vcvtq_f32_u32(vmovl_u16(halves_of_bytes(from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}

inline Words words_of_bytes(const uint8_t* from) {
#if defined(PINTPOT_AVX512)
        return reinterpret_cast<Words>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(PINTPOT_AVX2)
        return reinterpret_cast<Words>(
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(PINTPOT_NEON)
        return vmovl_u16(halves_of_bytes(from));
#else
        return __builtin_convertvector(load<Bytes>(from), Words);
#endif
    }

#if defined(PINTPOT_NEON)
// Where the bytes of numbers of 32 bits are in a table of them; beyond its end, which gives 0, for a number of -1.
inline uint8x16_t bytes_of(Words places) {
    return reinterpret_cast<uint8x16_t>(places * 0x04040404u + 0x03020100u);
}
#endif

// Stored numbers. The dtypes are numbered as in native.py.
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline float number(float x) { return x; }

inline float number(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float number(Float16 x) {
#if defined(PINTPOT_AVX512) || defined(PINTPOT_AVX2)
    return _cvtsh_ss(x.bits);
#elif defined(PINTPOT_NEON)
    __fp16 value;
    std::memcpy(&value, &x.bits, 2);
    return value;
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t rest = x.bits & 0x7fff;
    float value;
    if (rest < 0x0400) {
        value = std::ldexp(static_cast<float>(rest), -24);
    } else {
        const uint32_t bits = rest < 0x7c00 ? (rest << 13) + 0x38000000u : (rest << 13) | 0x7f800000u;
        std::memcpy(&value, &bits, 4);
    }
    return sign ? -value : value;
#endif
}

inline void put(float* to, float value) { *to = value; }

inline void put(BFloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline void put(Float16* to, float value) {
#if defined(PINTPOT_AVX512) || defined(PINTPOT_AVX2)
    to->bits = _cvtss_sh(value, 0);
#elif defined(PINTPOT_NEON)
    const __fp16 rounded = static_cast<__fp16>(value);
    std::memcpy(&to->bits, &rounded, 2);
#else
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) {
        to->bits = sign | 0x7e00;
    } else if (rest >= 0x477ff000u) {
        to->bits = sign | 0x7c00;
    } else if (rest < 0x38800000u) {
        // Below the normal numbers: in steps of 2^-24, ties to even, as the processor rounds by default.
        to->bits = sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
    } else {
        to->bits = sign | static_cast<uint16_t>((rest - 0x38000000u + 0x0fffu + ((rest >> 13) & 1u)) >> 13);
    }
#endif
}

inline Floats numbers(const float* from) { return load<Floats>(from); }

inline Floats numbers(const BFloat16* from) {
#if defined(PINTPOT_NEON)
    return reinterpret_cast<Floats>(vshll_n_u16(load<uint16x4_t>(from), 16));
#else
    return reinterpret_cast<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

inline Floats numbers(const Float16* from) {
#if defined(PINTPOT_AVX512)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(PINTPOT_AVX2)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(PINTPOT_NEON)
    return vcvt_f32_f16(load<float16x4_t>(from));
#else
    Floats found;
    for (int i = 0; i < kLanes; ++i) found[i] = number(from[i]);
    return found;
#endif
}

// The 16 bits of each number rounded to bfloat16, ties to even.
inline Halves bfloat16_bits(Floats x) {
    const Words bits = reinterpret_cast<Words>(x);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words kept = x == x ? rounded : Words{} + 0x7fc0u;
#if defined(PINTPOT_AVX512)
    return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(kept)));
#else
    return __builtin_convertvector(kept, Halves);
#endif
}

inline void put_all(float* to, Floats x) { store(to, x); }

inline void put_all(BFloat16* to, Floats x) { store(to, bfloat16_bits(x)); }

inline void put_all(Float16* to, Floats x) {
#if defined(PINTPOT_AVX512)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, 0));
#elif defined(PINTPOT_AVX2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, 0));
#elif defined(PINTPOT_NEON)
    store(to, vcvt_f16_f32(x));
#else
    for (int i = 0; i < kLanes; ++i) put(to + i, x[i]);
#endif
}

// Calls `function` with a pointer of the type that a dtype stands for.
template <typename Function>
inline void with_type(int64_t dtype, const void* data, const Function& function) {
    if (dtype == kFloat32) {
        function(static_cast<const float*>(data));
    } else if (dtype == kBFloat16) {
        function(static_cast<const BFloat16*>(data));
    } else {
        function(static_cast<const Float16*>(data));
    }
}

template <typename Function>
inline void with_type(int64_t dtype, void* data, const Function& function) {
    if (dtype == kFloat32) {
        function(static_cast<float*>(data));
    } else if (dtype == kBFloat16) {
        function(static_cast<BFloat16*>(data));
    } else {
        function(static_cast<Float16*>(data));
    }
}

}  // namespace
