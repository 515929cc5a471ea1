// Defines `kernels()` of the instruction set NVAE_ISA, for which the including file has set the compiler's target.
#include "bn_act/bn_act_kernel.h"
#include "cpu/kernels.h"
#include "depthwise_conv/depthwise_kernel.h"
#include "flow_cell/flow_cell_kernel.h"
#include "pointwise_conv/pointwise_kernel.h"
#include "se_residual/se_residual_kernel.h"

namespace nvae::NVAE_ISA {

template <typename T>
constexpr StorageKernels<T> storage_kernels{bn::table<T>, dw::table<T>, pw::table<T>, se::table<T>};

const CpuKernels& kernels() {
  static constexpr CpuKernels table{L, PANEL, &join_stats, &join_sums, flow::table, storage_kernels<float>, storage_kernels<bf16>};
  return table;
}

}  // namespace nvae::NVAE_ISA
