// Which instruction set the kernels of this process use: the best one that the CPU has, until a test asks for less.
#pragma once
#include <cstring>

// Functions compiled for an instruction set of their own (common/each_isa.h) need GCC on x86-64. Anything else runs the
// code of its compiler's target, which on aarch64 includes NEON.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NVAE_EACH_ISA 1
#endif

namespace nvae {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};
enum Isa { kBaseline, kAvx2, kAvx512 };

inline Isa best_isa() {
#ifdef NVAE_EACH_ISA
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

inline Isa& current_isa() {
  static Isa isa = best_isa();
  return isa;
}

// False when the CPU (or this build) lacks it.
inline bool use_isa(const char* name) {
  for (int i = kBaseline; i <= best_isa(); i++)
    if (std::strcmp(name, kIsaNames[i]) == 0) {
      current_isa() = static_cast<Isa>(i);
      return true;
    }
  return false;
}

}  // namespace nvae

// Picks among the copies of a function that common/each_isa.h made.
#ifdef NVAE_EACH_ISA
#define NVAE_SELECT(function)                              \
  (::nvae::current_isa() == ::nvae::kAvx512 ? avx512::function \
   : ::nvae::current_isa() == ::nvae::kAvx2 ? avx2::function   \
                                            : baseline::function)
#else
#define NVAE_SELECT(function) (baseline::function)
#endif
