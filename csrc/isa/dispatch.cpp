#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa/table.h"

namespace fastmerge {

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

namespace {

struct Candidate {
    const char* isa;
    const Kernels* table;  // null: not built for this architecture
    bool supported;
};

// Best first. __builtin_cpu_supports asks for the operating system's support of the registers too.
const std::vector<Candidate>& candidates() {
    static const std::vector<Candidate> all = [] {
#if defined(__x86_64__)
        __builtin_cpu_init();
        // Not __builtin_cpu_supports("f16c"): clang before 19 does not know that name.
        unsigned a = 0, b = 0, features = 0, d = 0;
        const bool f16c = __get_cpuid(1, &a, &b, &features, &d) && (features & bit_F16C);
        const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 =
            avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
        const Kernels *avx2_table = &kAvx2Kernels, *avx512_table = &kAvx512Kernels;
#else
        const bool avx2 = false, avx512 = false;
        const Kernels *avx2_table = nullptr, *avx512_table = nullptr;
#endif
#if defined(__aarch64__)
        const Kernels* neon_table = &kNeonKernels;
#else
        const Kernels* neon_table = nullptr;
#endif
        return std::vector<Candidate>{{"avx512", avx512_table, avx512},
                                      {"avx2", avx2_table, avx2},
                                      {"neon", neon_table, neon_table != nullptr},
                                      {"scalar", &kScalarKernels, true}};
    }();
    return all;
}

std::string names(bool only_supported) {
    std::string text;
    for (const Candidate& candidate : candidates())
        if (candidate.supported || !only_supported)
            text += (text.empty() ? "" : ", ") + std::string(candidate.isa);
    return text;
}

const Kernels& find(const std::string& name, const std::string& where) {
    for (const Candidate& candidate : candidates()) {
        if (name != candidate.isa) continue;
        if (candidate.supported) return *candidate.table;
        throw std::invalid_argument(where + ": this CPU cannot run '" + name + "'; use one of " +
                                    names(true));
    }
    throw std::invalid_argument(where + ": unknown instruction set '" + name +
                                "'; known: " + names(false));
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = active.load(std::memory_order_acquire);
    if (table) return *table;
    const char* forced = std::getenv("FASTMERGE_ISA");
    const Kernels& chosen = forced && *forced && std::string(forced) != "auto"
                                ? find(forced, "FASTMERGE_ISA")
                                : find(supported_isas().front(), "auto");
    active.store(&chosen, std::memory_order_release);
    return chosen;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> found;
    for (const Candidate& candidate : candidates())
        if (candidate.supported) found.push_back(candidate.isa);
    return found;
}

void set_isa(const std::string& name) {
    active.store(&find(name, "set_isa"), std::memory_order_release);
}

}  // namespace fastmerge
