// Picks the instance of a 1x1 kernel for its arguments.
#pragma once
#include "pointwise_conv/pointwise_kernel.h"

namespace nvae::NVAE_ISA::pw {

template <typename T>
void forward_any(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  if (!f.scale) return forward<kIdentity, false>(s, f, task, scratch);
  if (s.act == kSwish) return forward<kSwish, true>(s, f, task, scratch);
  if (s.act == kElu) return forward<kElu, true>(s, f, task, scratch);
  forward<kIdentity, true>(s, f, task, scratch);
}

template <int ACT, bool AFFINE, typename T>
void backward_bn(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  f.c1 ? backward<ACT, AFFINE, true>(s, f, task, scratch) : backward<ACT, AFFINE, false>(s, f, task, scratch);
}

template <typename T>
void backward_any(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  if (!f.scale) return backward_bn<kIdentity, false>(s, f, task, scratch);
  if (s.act == kSwish) return backward_bn<kSwish, true>(s, f, task, scratch);
  if (s.act == kElu) return backward_bn<kElu, true>(s, f, task, scratch);
  backward_bn<kIdentity, true>(s, f, task, scratch);
}

constexpr pointwise_conv::Kernels table{PANEL, &forward_any<float>, &forward_any<bf16>, &backward_any<float>, &backward_any<bf16>};

}  // namespace nvae::NVAE_ISA::pw
