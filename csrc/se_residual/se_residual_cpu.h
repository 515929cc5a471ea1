#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace nvae::se_residual {

// Schemas: kernels/se_residual/ops.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(const at::Tensor& skip, const at::Tensor& x,
                                                           const std::optional<at::Tensor>& bn, const std::optional<at::Tensor>& w1,
                                                           const std::optional<at::Tensor>& b1, const std::optional<at::Tensor>& w2,
                                                           const std::optional<at::Tensor>& b2,
                                                           const std::optional<at::Tensor>& x_means, double residual_scale, bool stats);
std::vector<at::Tensor> backward_cpu(const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& bn,
                                     const std::optional<at::Tensor>& w1, const std::optional<at::Tensor>& w2, const at::Tensor& state,
                                     double residual_scale);

}  // namespace nvae::se_residual
