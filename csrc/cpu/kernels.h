// The CPU kernels that are compiled once per instruction set as translation units of their own (csrc/cpu/<set>.cpp), because
// they are templates over vectors of that set's width. Each exports one table.
#pragma once
#include "common/isa.h"
#include "depthwise_conv/depthwise_conv.h"

namespace nvae {

struct CpuKernels {
  depthwise_conv::Kernels depthwise_conv;
};

namespace baseline { const CpuKernels& kernels(); }
#ifdef NVAE_EACH_ISA
namespace avx2 { const CpuKernels& kernels(); }
namespace avx512 { const CpuKernels& kernels(); }
#endif

// Those of the instruction set in use.
inline const CpuKernels& cpu_kernels() { return NVAE_SELECT(kernels)(); }

}  // namespace nvae
