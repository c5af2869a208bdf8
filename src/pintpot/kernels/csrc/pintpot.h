// The C interface of the library, as native.py calls it. Sizes are in elements unless they are called bytes.
//
// Arrays are contiguous. `threads` is the most threads that a call may use; results do not depend on it. Dtypes are
// 0 float32, 1 bfloat16, 2 float16.
#pragma once

#include <cstdint>

// Nothing but this is visible outside the library.
#pragma GCC visibility push(default)
extern "C" {

// A moment of an optimizer, packed in blocks.
struct PintpotMoment {
    uint8_t* codes;        // (numel,) at 8 bits, (ceil(numel / 2),) at 4, the first of two in the low half
    float* scales;         // (ceil(numel / block),)
    const float* levels;   // (256,) at 8 bits; (256, 2) at 4, the numbers of both halves of a byte
    const uint8_t* table;  // (65536,) the code for each bfloat16 number from -1 to 1
};

struct PintpotAdam {
    void* parameter;
    const void* gradient;
    PintpotMoment first, second;
    int64_t parameter_dtype, gradient_dtype;
    int64_t numel, block, bits, step, threads;
    double lr, beta1, beta2, eps, weight_decay;
};

// Integers of 1 to 8 bits in the planar layout of packing.py, rows of `count`.
struct PintpotPacking {
    uint8_t* packed;
    uint8_t* codes;
    int64_t rows, count, bits, threads;
};

// Such rows with a scale and a least number for each group of `group`.
struct PintpotRestore {
    const uint8_t* packed;  // (rows, packed_size(count, bits))
    const void* scale;      // (rows, ceil(count / group))
    const void* low;        // likewise, of the same dtype
    float* output;          // (rows, count)
    int64_t dtype, rows, count, group, bits, threads;
};

// A matrix of rows of integers with a scale and a zero for each group, as in grid.py.
struct PintpotGrid {
    const uint8_t* packed;  // (rows, packed_size(columns, bits))
    const void* scale;      // (rows, groups)
    const uint8_t* zero;    // (rows, packed_size(groups, bits)), or null
    int64_t scale_dtype, rows, columns, group, bits;
};

struct PintpotGridMatmul {
    PintpotGrid grid;
    const void* input;  // (count, columns)
    void* output;       // (count, rows)
    int64_t dtype, count, threads;
};

struct PintpotGridDequantize {
    PintpotGrid grid;
    void* output;  // (rows, columns)
    int64_t dtype, threads;
};

// Numbers rounded to those of a format, as in rounding.py.
struct PintpotRounding {
    const void* input;  // (count,)
    void* output;       // likewise
    int64_t dtype, count;
    int64_t digits, least_exponent, flushes, mode;
    int64_t seed, stream, threads;
    float low, high;     // the range
    float below, above;  // what finite numbers beyond it become
    float least, most;   // what the infinities become
};

// Blocks of numbers, each times a Hadamard matrix and `scale`, as in hadamard.py.
struct PintpotHadamard {
    const void* input;  // (count,), a multiple of `block`
    void* output;       // likewise
    int64_t dtype, count, block, threads;
    float scale;
};

// Floats of 16 or 32 bits whose bytes lie apart, as in core/byte_planes.py.
struct PintpotPlanes {
    const uint8_t* exponents;  // (count,)
    const uint8_t* signs;      // the signs with the leading seven bits of the mantissas
    const uint8_t* upper;      // the bytes below, of 32 bits only
    const uint8_t* lower;
    void* output;  // (count,)
    int64_t width, count;
};

// The name of the instruction set in use.
const char* pintpot_path();

// The function of the OpenMP runtime that starts threads (`GOMP_parallel`), or null.
void pintpot_use_runtime(void* parallel);

// Every operation with its arguments. Each gives 0, or 1 where memory ran out and its output is not whole.
#define PINTPOT_OPERATIONS(EACH) \
    EACH(adam, PintpotAdam) \
    EACH(pack, PintpotPacking) \
    EACH(unpack, PintpotPacking) \
    EACH(restore, PintpotRestore) \
    EACH(grid_dequantize, PintpotGridDequantize) \
    EACH(grid_matmul, PintpotGridMatmul) \
    EACH(round_to, PintpotRounding) \
    EACH(hadamard, PintpotHadamard) \
    EACH(join_planes, PintpotPlanes)

#define PINTPOT_DECLARE(name, arguments) int pintpot_##name(const arguments* call);
PINTPOT_OPERATIONS(PINTPOT_DECLARE)
#undef PINTPOT_DECLARE
}
#pragma GCC visibility pop
