#include "common/isa.h"
#ifdef NVAE_EACH_ISA
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in the headers of the intrinsics
#define NVAE_ISA avx512
#define NVAE_AVX2 1
#define NVAE_AVX512 1  // GCC's C++ preprocessor does not see __AVX512F__ after the pragma
#include "cpu/table.h"
#endif
