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

// A matrix of rows of integers with a scale and a zero for each group, as in grid.py. For `planes_dequantize` and
// `lut_matmul` what is packed are bit planes, as in lookup.py.
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
    int64_t digits;  // of 8 bits or more, that inputs are rounded to; 0 for as many as their dtype has
};

struct PintpotGridDequantize {
    PintpotGrid grid;
    void* output;  // (rows, columns)
    int64_t dtype, threads;
};

// Packed keys and values of `tokens` tokens of every head, with room for `room`.
struct PintpotAttendBlock {
    const uint8_t* keys;     // attend_packed: (heads, key_dim, room / key_group, packed_size(key_group, bits));
                             // attend_fp8: (heads, room, key_dim)
    const void* key_scale;   // (heads, key_dim, room / key_group); attend_fp8: (heads, room), or (heads,)
    const void* key_low;     // likewise; attend_fp8: null
    const uint8_t* values;   // (heads, room, packed_size(value_dim, bits)); attend_fp8: (heads, room, value_dim)
    const void* value_scale; // (heads, room, value_dim / value_group); attend_fp8: (heads, room), or (heads,)
    const void* value_low;   // likewise; attend_fp8: null
    int64_t tokens, room;
};

struct PintpotAttend {
    const PintpotAttendBlock* blocks;
    const float* query;  // (heads, rows, key_dim), scaled
    float* out;          // (heads, rows, value_dim), relative to top
    float* top;          // (heads, rows), the greatest score
    float* norm;         // (heads, rows), the sum of the exponentials, relative to top
    int64_t scale_dtype, bits;
    int64_t key_group, value_group;  // attend_fp8: key_group is 1 where each token has a scale, else 0
    int64_t count, heads, rows, key_dim, value_dim, threads;
    double softcap;  // scores become softcap * tanh(scores / softcap); 0 leaves them
};

// Attention to tokens whose keys, before positions turned them, were joined over the heads of a sequence (`width`
// numbers), mixed and put into another order. In `attend`, keys of a block are (sequences, room, packed_size(width,
// bits)), and key_scale and key_low (sequences, room, width / key_group). Values are those of attend_packed; they were
// mixed too, and so is `out`.
struct PintpotAttendRotated {
    PintpotAttend attend;
    const int32_t* const* positions;  // for each block (sequences, room), or null: a token's number is its position
    const int32_t* order;             // (orders, width), the channel at each place; one for each sequence, or for all
    const float* frequencies;         // (waves,): channels i, i + waves of a head are turned by position * frequency
    const int32_t* skipped;           // (sequences, skips), numbers of tokens that are left out
    int64_t sequences, orders, waves, skips, key_block;
    int64_t first;   // number of the first block's first token
    double scaling;  // of the channels that are turned
};

// left (rows, rank) times right (rank, columns).
struct PintpotLowRankMatmul {
    const void* left;
    const void* right;
    const void* input;  // (count, columns)
    void* output;       // (count, rows)
    int64_t factor_dtype, dtype, rows, rank, columns, count, threads;
};

// A matrix of blocks, some of which are kept, as in sparse.py.
struct PintpotSparse {
    const uint8_t* bitmap;  // (rows, packed_size(columns, 1))
    const void* values;     // (held,) the numbers of one kept block after the other; unused where `grid` holds them
    PintpotGrid grid;       // of `held` numbers, row after row; where it has no codes, `values` holds them
    int64_t dtype, held;
    int64_t rows, columns;  // of blocks
    int64_t block_rows, block_columns;
};

struct PintpotSparseMatmul {
    PintpotSparse weight;
    const void* input;  // (count, columns * block_columns)
    void* output;       // (count, rows * block_rows)
    int64_t dtype, count, threads;
};

struct PintpotSparseDecode {
    PintpotSparse weight;
    void* output;  // (rows * block_rows, columns * block_columns)
    int64_t dtype, threads;
};

// A matrix (rows, columns) in tiles, some of whose numbers are kept, as in tiled.py.
struct PintpotTiledMatmul {
    const void* values;      // (held,)
    const int16_t* places;   // (held,)
    const int32_t* starts;   // (tiles + 1,)
    const void* input;       // (count, columns)
    void* output;            // (count, rows)
    int64_t value_dtype, dtype, held, rows, columns, tile_rows, tile_columns, count, threads;
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

// What a weight is multiplied with, or where its numbers go.
struct PintpotOperand {
    const void* input;  // (count, columns), transposed (count, rows); null for the numbers themselves
    void* output;       // (count, rows), transposed (count, columns); (rows, columns) for the numbers
    int64_t dtype, count, threads;
};

// Indices into a codebook, as in tables.py: packed, the bits above the eighth apart.
struct PintpotBook {
    const uint8_t* index;  // (rows, packed_size(ceil(columns / vector), min(bits, 8)))
    const uint8_t* high;   // (rows, packed_size(ceil(columns / vector), bits - 8)), or null
    const void* entries;   // (1 << bits, vector)
    int64_t bits;
};

struct PintpotCodebook {
    PintpotBook main, residual;  // the second with a null index where there is none
    int64_t dtype, rows, columns, vector;
};

struct PintpotCodebookCall {
    PintpotCodebook weight;
    PintpotOperand operand;
};

// Signs times the product of two factors.
struct PintpotSignRank {
    const uint8_t* signs;  // (rows, packed_size(columns, 1))
    const void* left;      // (rows, rank)
    const void* right;     // (rank, columns), of the same dtype
    int64_t dtype, rows, columns, rank;
};

struct PintpotSignRankCall {
    PintpotSignRank weight;
    PintpotOperand operand;
};

// Ternary numbers: digits of base 3, five in a byte, or of base 4, four in a byte.
struct PintpotTernary {
    const uint8_t* packed;  // (rows, ceil(columns / per_byte))
    const void* scale;      // (rows, ceil(columns / group))
    int64_t dtype, rows, columns, group, per_byte;
};

struct PintpotTernaryCall {
    PintpotTernary weight;
    PintpotOperand operand;
};

// The name of the instruction set in use.
const char* pintpot_path();

// The function of the OpenMP runtime that starts threads (`GOMP_parallel`), or null.
void pintpot_use_runtime(void* parallel);

// Every operation with its arguments. Each gives 0, or, where its output is not whole, 1 (memory ran out) or 2 (arrays
// contradict one another).
#define PINTPOT_OPERATIONS(EACH) \
    EACH(adam, PintpotAdam) \
    EACH(pack, PintpotPacking) \
    EACH(unpack, PintpotPacking) \
    EACH(restore, PintpotRestore) \
    EACH(grid_dequantize, PintpotGridDequantize) \
    EACH(grid_matmul, PintpotGridMatmul) \
    EACH(row_tiles_dequantize, PintpotGridDequantize) \
    EACH(row_tiles_matmul, PintpotGridMatmul) \
    EACH(attend_packed, PintpotAttend) \
    EACH(attend_fp8, PintpotAttend) \
    EACH(attend_rotated, PintpotAttendRotated) \
    EACH(planes_dequantize, PintpotGridDequantize) \
    EACH(lut_matmul, PintpotGridMatmul) \
    EACH(low_rank_matmul, PintpotLowRankMatmul) \
    EACH(sparse_matmul, PintpotSparseMatmul) \
    EACH(sparse_decode, PintpotSparseDecode) \
    EACH(tiled_matmul, PintpotTiledMatmul) \
    EACH(round_to, PintpotRounding) \
    EACH(hadamard, PintpotHadamard) \
    EACH(join_planes, PintpotPlanes) \
    EACH(codebook_decode, PintpotCodebookCall) \
    EACH(codebook_matmul, PintpotCodebookCall) \
    EACH(codebook_matmul_transposed, PintpotCodebookCall) \
    EACH(sign_rank_decode, PintpotSignRankCall) \
    EACH(sign_rank_matmul, PintpotSignRankCall) \
    EACH(ternary_decode, PintpotTernaryCall) \
    EACH(ternary_matmul, PintpotTernaryCall)

#define PINTPOT_DECLARE(name, arguments) int pintpot_##name(const arguments* call);
PINTPOT_OPERATIONS(PINTPOT_DECLARE)
#undef PINTPOT_DECLARE
}
#pragma GCC visibility pop
