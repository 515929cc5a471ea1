#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace nvae::adamax {

// Schemas, formula and the layout of an arena: kernels/adamax.

// A tensor over elements of flat from number `begin` on, with a storage of its own that ends with it.
at::Tensor place(const at::Tensor& flat, int64_t begin, at::IntArrayRef size, at::IntArrayRef stride);

// The sum of all squares, float64.
at::Tensor squares(at::TensorList grads);

// False, and nothing is written, where a parameter is no longer where the layout says.
bool step_(at::TensorList params, at::TensorList grads, at::IntArrayRef numbers, const at::Tensor& layout,
           const at::Tensor& param, const at::Tensor& exp_avg, const at::Tensor& exp_inf,
           const std::optional<at::Tensor>& ema, const at::Tensor& steps, const std::optional<at::Tensor>& factor,
           const std::optional<at::Tensor>& take, double lr, double beta1, double beta2, double eps, double weight_decay,
           bool maximize, double ema_decay);

}  // namespace nvae::adamax
