#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace nvae::weight_norm {

using MaybeTensors = c10::List<std::optional<at::Tensor>>;

// The effective weights; schemas and formulas: kernels/weight_norm.
std::vector<at::Tensor> forward_cpu(at::TensorList weights, at::TensorList log_norms, const MaybeTensors& masks, double eps);

// The gradients of those weights whose effective weight has one, then those of their log_norms.
std::vector<at::Tensor> backward_cpu(const MaybeTensors& grads, at::TensorList weights, at::TensorList log_norms,
                                     const MaybeTensors& masks, double eps);

}  // namespace nvae::weight_norm
