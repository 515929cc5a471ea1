// act(u) and its derivative, as the prologues of the kernels apply them.
#pragma once
#include "common/simd.h"

namespace nvae::NVAE_ISA {

enum Act { kIdentity, kSwish, kElu };

template <int ACT>
NVAE_ALWAYS vf activate(vf u) {
  if constexpr (ACT == kSwish) return u * sigmoid(u);
  if constexpr (ACT == kElu) return select(u > 0.0f, u, exp_(u) - 1.0f);
  return u;
}

// value = act(u), slope = act'(u)
template <int ACT>
NVAE_ALWAYS void activate_both(vf u, vf& value, vf& slope) {
  if constexpr (ACT == kSwish) {
    const vf s = sigmoid(u);
    value = u * s;
    slope = s + value * (1.0f - s);
  } else if constexpr (ACT == kElu) {
    const vf e = exp_(u);
    value = select(u > 0.0f, u, e - 1.0f);
    slope = select(u > 0.0f, splat(1.0f), e);
  } else {
    value = u;
    slope = splat(1.0f);
  }
}

}  // namespace nvae::NVAE_ISA
