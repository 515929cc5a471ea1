#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace nvae::flow_cell {

// Schemas: kernels/flow_cell/ops.py.
std::vector<at::Tensor> forward_cpu(const at::Tensor& z, at::TensorList weights);
std::vector<at::Tensor> backward_cpu(const at::Tensor& dy, at::TensorList zs, at::TensorList weights);

}  // namespace nvae::flow_cell
