// What the kernels of residual_normal take: the elements of a tile, as floats, in whatever order; and how a row is summed.
#pragma once

namespace nvae::residual_normal {

constexpr int kLanes = 16;   // sums that a row is taken in: its pixel i goes to number i % kLanes
constexpr int kBlock = 256;  // pixels of a row whose sums are float; beyond them, double
constexpr int kTile = 512;   // elements
constexpr int kWidth = kTile / kLanes;  // channels

struct Inputs {
  const float *mu_q, *log_sigma_q, *mu_p, *log_sigma_p, *noise;  // mu_p null: the prior is Normal(0, 0)
  const float *bias_mu, *bias_log_sigma;                         // added to mu_q and log_sigma_q
  int n;                                                         // a multiple of kLanes
  bool residual;
};

struct Outputs {
  float *z, *kl, *log_q, *log_p;  // the terms of the three sums, not their sums
};

struct Gradients {
  const float *z, *kl, *log_q, *log_p;     // for each element, that of its row's sum
  const float *also_mu_p, *also_log_sigma_p;  // added to those of the prior; null: nothing is
  float *mu_q, *log_sigma_q, *mu_p, *log_sigma_p;
};

struct DensityInputs {
  const float *z, *mu, *log_sigma;  // mu null: Normal(0, 0)
  int n;                            // as above
};

struct DensityGradients {
  const float *log_p, *kl;  // for each element, those of its row's sums; kl is log q - log p
  const float* also_z;      // added to that of z; null: nothing is
  float *z, *mu, *log_sigma;
};

}  // namespace nvae::residual_normal
