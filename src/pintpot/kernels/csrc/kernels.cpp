// All operations for one instruction set. The build compiles this file once for each, with its options and its name in
// PINTPOT_ISA; what is not the table below has internal linkage, so that no two copies are mixed up by the linker.
#include "adam.h"
#include "attend.h"
#include "attend_rotated.h"
#include "dispatch.h"
#include "grid.h"
#include "hadamard.h"
#include "lookup.h"
#include "low_rank.h"
#include "planes.h"
#include "rounding.h"
#include "row_tiles.h"
#include "signs.h"
#include "sparse.h"
#include "tables.h"
#include "tiled.h"

extern const PintpotKernels PINTPOT_TABLE(PINTPOT_ISA);
#define PINTPOT_ENTRY(name, arguments) name,
const PintpotKernels PINTPOT_TABLE(PINTPOT_ISA) = {PINTPOT_OPERATIONS(PINTPOT_ENTRY)};
