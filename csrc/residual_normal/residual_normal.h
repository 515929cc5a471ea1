// What the kernels of residual_normal take: up to kBlock neighbouring elements of one (batch, channel) row, as floats.
#pragma once

namespace nvae::residual_normal {

constexpr int kBlock = 256;

struct Inputs {
  const float *mu_q, *log_sigma_q, *mu_p, *log_sigma_p, *noise;  // mu_p null: the prior is Normal(0, 0)
  int n;
  bool residual;
};

struct Sums {
  float kl, log_q, log_p;
};

struct Gradients {
  const float* dz;
  Sums row;  // gradients of the row's three sums
  float *mu_q, *log_sigma_q, *mu_p, *log_sigma_p;
};

}  // namespace nvae::residual_normal
