// What the kernel of adamax takes: n neighbouring elements of one parameter, and the numbers of its step.
#pragma once
#include <cstdint>

namespace nvae::adamax {

struct Elements {
  float* param;
  const float* grad;
  float *exp_avg, *exp_inf;
  int64_t n;
};

struct Step {
  float size;         // -lr / (1 - beta1^t)
  float weight;       // 1 - beta1
  float beta2, eps;
  float decay;        // weight decay
  float sign;         // of the gradient: -1 maximises
};

}  // namespace nvae::adamax
