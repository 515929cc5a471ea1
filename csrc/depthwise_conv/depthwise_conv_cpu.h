#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace nvae::depthwise_conv {

// Schemas: kernels/depthwise_conv/ops.py.
std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, const std::optional<at::Tensor>& bn, int64_t act,
                                               const at::Tensor& weight, int64_t stride, int64_t dilation, int64_t upsample, bool stats);
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& y,
                                                            const std::optional<at::Tensor>& c, const at::Tensor& x,
                                                            const std::optional<at::Tensor>& bn, int64_t act, const at::Tensor& weight,
                                                            int64_t stride, int64_t dilation, int64_t upsample, double values);

// The same for stride 1 without upsampling, du in the memory of dy.
std::tuple<at::Tensor, at::Tensor> backward_cpu_(at::Tensor& dy, const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& c,
                                                 const at::Tensor& x, const std::optional<at::Tensor>& bn, int64_t act,
                                                 const at::Tensor& weight, int64_t dilation, double values);

}  // namespace nvae::depthwise_conv
