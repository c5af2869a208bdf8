// The operations of one instruction set.
#pragma once

#include "pintpot.h"

struct PintpotKernels {
    void (*adam)(const PintpotAdam&);
    void (*pack)(const PintpotPacking&);
    void (*unpack)(const PintpotPacking&);
    void (*restore)(const PintpotRestore&);
    int (*grid_dequantize)(const PintpotGridDequantize&);
    int (*grid_matmul)(const PintpotGridMatmul&);
};

#define PINTPOT_JOIN(name, isa) name##_##isa
#define PINTPOT_TABLE_OF(isa) PINTPOT_JOIN(pintpot_kernels, isa)
#define PINTPOT_TABLE(isa) PINTPOT_TABLE_OF(isa)
