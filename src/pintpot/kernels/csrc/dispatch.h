// The operations of one instruction set.
#pragma once

#include "pintpot.h"

struct PintpotKernels {
#define PINTPOT_FIELD(name, arguments) int (*name)(const arguments&);
    PINTPOT_OPERATIONS(PINTPOT_FIELD)
#undef PINTPOT_FIELD
};

#define PINTPOT_JOIN(name, isa) name##_##isa
#define PINTPOT_TABLE_OF(isa) PINTPOT_JOIN(pintpot_kernels, isa)
#define PINTPOT_TABLE(isa) PINTPOT_TABLE_OF(isa)
