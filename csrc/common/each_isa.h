// Includes the file named by NVAE_KERNEL once per instruction set, each time in a namespace of that name.
//
// Such a file includes nothing and uses no templates of the standard library: a weak symbol compiled for AVX-512 could be
// linked into the baseline path and stop an old CPU. What it calls must be always_inline (common/math.h) or its own.
// Include this one inside the op's namespace, after common/isa.h. No include guard: every op includes it.
namespace baseline {
#include NVAE_KERNEL
}
#ifdef NVAE_EACH_ISA
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include NVAE_KERNEL
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include NVAE_KERNEL
}
#pragma GCC pop_options
#endif
