// Defines `kernels()` of the instruction set NVAE_ISA, for which the including file has set the compiler's target.
#include "cpu/kernels.h"
#include "depthwise_conv/depthwise_kernel.h"

namespace nvae::NVAE_ISA {
const CpuKernels& kernels() {
  static constexpr CpuKernels table{dw::table};
  return table;
}
}  // namespace nvae::NVAE_ISA
