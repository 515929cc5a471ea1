// The CPU kernels that are compiled once per instruction set as translation units of their own (csrc/cpu/<set>.cpp), because
// they are templates over vectors of that set's width. Each exports one table.
#pragma once
#include "bn_act/bn_act.h"
#include "common/isa.h"
#include "depthwise_conv/depthwise_conv.h"
#include "flow_cell/flow_cell.h"
#include "pointwise_conv/pointwise_conv.h"
#include "se_residual/se_residual.h"

namespace nvae {

// T: the storage type of images, float or the bits of bfloat16.
template <typename T>
struct StorageKernels {
  bn_act::Kernels<T> bn_act;
  depthwise_conv::Kernels<T> depthwise_conv;
  pointwise_conv::Kernels<T> pointwise_conv;
  se_residual::Kernels<T> se_residual;
};

struct CpuKernels {
  int lanes, panel;  // channels of a vector, columns of a packed panel
  void (*join_stats)(const float* parts, int64_t count, int64_t channels, double rows, double last, float* out);
  void (*join_sums)(const float* parts, int64_t count, int64_t width, int64_t begin, int64_t end, float* out);
  flow_cell::Kernels flow_cell;
  StorageKernels<float> f32;
  StorageKernels<uint16_t> bf16;

  const StorageKernels<float>& of(const float*) const { return f32; }
  const StorageKernels<uint16_t>& of(const uint16_t*) const { return bf16; }
};

namespace baseline { const CpuKernels& kernels(); }
#ifdef NVAE_EACH_ISA
namespace avx2 { const CpuKernels& kernels(); }
namespace avx512 { const CpuKernels& kernels(); }
#endif

// Those of the instruction set in use.
inline const CpuKernels& cpu_kernels() { return NVAE_SELECT(kernels)(); }

}  // namespace nvae
