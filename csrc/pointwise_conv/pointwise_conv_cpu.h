#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace nvae::pointwise_conv {

// Schemas: kernels/pointwise_conv/ops.py.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, const std::optional<at::Tensor>& bn, int64_t act,
                                                           const at::Tensor& weight, bool stats, bool means,
                                                           const std::optional<at::Tensor>& bias,
                                                           const std::optional<at::Tensor>& addend,
                                                           const std::optional<at::Tensor>& beside);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& dy, const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& c, const at::Tensor& x,
    const std::optional<at::Tensor>& bn, int64_t act, const at::Tensor& weight, double values, bool bias,
    const std::optional<at::Tensor>& also, const std::optional<at::Tensor>& beside);

}  // namespace nvae::pointwise_conv
