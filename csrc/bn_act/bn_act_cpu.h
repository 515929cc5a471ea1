#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace nvae::bn_act {

// Schemas: kernels/bn_act/ops.py.
at::Tensor stats_cpu(const at::Tensor& x);
at::Tensor coefficients_cpu(const at::Tensor& stats, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                            double eps);
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients_cpu(const at::Tensor& sums, const at::Tensor& bn, double count);
void move_cpu(at::Tensor& running_mean, at::Tensor& running_var, const at::Tensor& bn, double rate, double count);
at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& bn, int64_t act);
at::Tensor sums_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bn, int64_t act);
at::Tensor backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bn, int64_t act, const at::Tensor& c);
void affine_cpu_(at::Tensor& du, const at::Tensor& x, const at::Tensor& c);

}  // namespace nvae::bn_act
