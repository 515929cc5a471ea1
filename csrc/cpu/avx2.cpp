#include "common/isa.h"
#ifdef NVAE_EACH_ISA
#pragma GCC target("avx2,fma,f16c")
#define NVAE_ISA avx2
#define NVAE_AVX2 1
#include "cpu/table.h"
#endif
