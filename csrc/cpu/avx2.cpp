#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#define NVAE_ISA avx2
#include "cpu/table.h"
#endif
