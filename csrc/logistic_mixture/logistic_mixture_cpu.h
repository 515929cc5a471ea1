#pragma once
#include <ATen/core/Tensor.h>

namespace nvae::logistic_mixture {

// log p [B, H, W] float32; schemas and formulas: kernels/logistic_mixture.
at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& params, int64_t num_mixtures, int64_t num_bits, bool fixed);

// Gradient of params from that of log p.
at::Tensor backward_cpu(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& params, int64_t num_mixtures,
                        int64_t num_bits, bool fixed);

}  // namespace nvae::logistic_mixture
