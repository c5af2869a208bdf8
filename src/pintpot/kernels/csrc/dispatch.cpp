// The choice of the instruction set, once, when the library is first used.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern const PintpotKernels PINTPOT_TABLE(generic);
#if defined(__x86_64__)
extern const PintpotKernels PINTPOT_TABLE(avx2);
extern const PintpotKernels PINTPOT_TABLE(avx512);
#elif defined(__aarch64__) && defined(__linux__)
extern const PintpotKernels PINTPOT_TABLE(dotprod);
#endif

namespace {

struct Path {
    const char* name;
    const PintpotKernels* kernels;
    bool usable;
};

#if defined(__x86_64__)
// (Compilers differ in whether __builtin_cpu_supports knows this one.)
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// PINTPOT_ISA forces one of the paths that this processor has (for tests).
Path choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    const Path paths[] = {{"avx512", &PINTPOT_TABLE(avx512), avx512},
                          {"avx2", &PINTPOT_TABLE(avx2), avx2},
                          {"generic", &PINTPOT_TABLE(generic), true}};
#elif defined(__aarch64__) && defined(__linux__)
    const Path paths[] = {{"dotprod", &PINTPOT_TABLE(dotprod), (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0},
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
