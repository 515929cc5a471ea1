// What the kernels of adamax take: n neighbouring elements of one parameter, and the numbers of its step.
#pragma once
#include <cstdint>

namespace nvae::adamax {

struct Elements {
  float* param;
  const float* grad;
  float *exp_avg, *exp_inf;
  float* ema;  // or null
  int64_t n;
};

struct Step {
  float size;    // -lr / (1 - beta1^t)
  float weight;  // 1 - beta1
  float beta2, eps;
  float decay;       // weight decay
  float factor;      // of the gradient: unscales and clips it; negative maximises
  float ema_weight;  // 1 - the decay of the averaged parameters
};

}  // namespace nvae::adamax
