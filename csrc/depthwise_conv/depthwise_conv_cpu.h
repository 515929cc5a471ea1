#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace nvae::depthwise_conv {

// Schemas: kernels/depthwise_conv/ops.py.
at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& weight, int64_t stride, int64_t dilation);
std::tuple<at::Tensor, at::Tensor> backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                                int64_t stride, int64_t dilation);

}  // namespace nvae::depthwise_conv
