#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

namespace nvae::flow_cell {

// Schemas: kernels/flow_cell/ops.py.
at::Tensor forward_cpu(const at::Tensor& z, const at::Tensor& w_in, const at::Tensor& w_dw, const at::Tensor& w_out,
                       const at::Tensor& bias_out);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& dy, const at::Tensor& z, const at::Tensor& w_in, const at::Tensor& w_dw, const at::Tensor& w_out,
    const at::Tensor& bias_out);

}  // namespace nvae::flow_cell
