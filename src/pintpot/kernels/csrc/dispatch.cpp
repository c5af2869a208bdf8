// The choice of the instruction set, once, when the library is first used.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

extern const PintpotKernels PINTPOT_TABLE(generic);
#if defined(__x86_64__)
extern const PintpotKernels PINTPOT_TABLE(avx2);
extern const PintpotKernels PINTPOT_TABLE(avx512);
#endif

namespace {

struct Path {
    const char* name;
    const PintpotKernels* kernels;
    bool usable;
};

// PINTPOT_ISA forces one of the paths that this processor has (for tests).
Path choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    const Path paths[] = {{"avx512", &PINTPOT_TABLE(avx512), avx512},
                          {"avx2", &PINTPOT_TABLE(avx2), avx2},
                          {"generic", &PINTPOT_TABLE(generic), true}};
#else
    const Path paths[] = {{"generic", &PINTPOT_TABLE(generic), true}};
#endif
    const char* asked = std::getenv("PINTPOT_ISA");
    for (const Path& path : paths) {
        if (path.usable && asked && !std::strcmp(asked, path.name)) return path;
    }
    for (const Path& path : paths) {
        if (path.usable) return path;
    }
    return paths[0];
}

const Path& path() {
    static const Path chosen = choose();
    return chosen;
}

}  // namespace

extern "C" {

const char* pintpot_path() { return path().name; }

#define PINTPOT_DEFINE(name, arguments) \
    int pintpot_##name(const arguments* call) { return path().kernels->name(*call); }
PINTPOT_OPERATIONS(PINTPOT_DEFINE)
}
