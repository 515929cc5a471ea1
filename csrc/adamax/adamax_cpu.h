#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace nvae::adamax {

// Steps the parameters it can, in place, and returns the numbers of the others; schema and formula: kernels/adamax.
std::vector<int64_t> adamax_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_infs,
                             at::TensorList steps, double lr, double beta1, double beta2, double eps, double weight_decay,
                             bool maximize);

}  // namespace nvae::adamax
