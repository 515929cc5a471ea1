#pragma once
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace nvae::power_iteration {

// (sigma [L], the new u and v, each laid end to end), float32; schemas and formulas: kernels/power_iteration.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(at::TensorList weights, at::TensorList u, at::TensorList v,
                                                           int64_t iterations, double eps);

// dsigma_i u_i v_i^T for every weight, float32. `layouts`: number of axes, sizes and strides of each weight, one weight
// after the other; a gradient has its weight's strides where these are dense.
std::vector<at::Tensor> backward_cpu(const at::Tensor& dsigma, const at::Tensor& u, const at::Tensor& v,
                                     at::IntArrayRef layouts);

// The same, each added to the other gradient of its weight, where there is one.
std::vector<at::Tensor> add_cpu(const c10::List<std::optional<at::Tensor>>& others, const at::Tensor& dsigma,
                                const at::Tensor& u, const at::Tensor& v, at::IntArrayRef layouts);

}  // namespace nvae::power_iteration
