#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace nvae::residual_normal {

// (z [B, Z, h, w], kl, log_q, log_p [B, Z] float32); schemas and formulas: kernels/residual_normal.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_cpu(
    const at::Tensor& mu_q, const at::Tensor& log_sigma_q, const std::optional<at::Tensor>& mu_p,
    const std::optional<at::Tensor>& log_sigma_p, const at::Tensor& noise, bool residual);

// Gradients of (mu_q, log_sigma_q), and of (mu_p, log_sigma_p) when given.
std::vector<at::Tensor> backward_cpu(
    const std::optional<at::Tensor>& dz, const std::optional<at::Tensor>& dkl, const std::optional<at::Tensor>& dlog_q,
    const std::optional<at::Tensor>& dlog_p, const at::Tensor& mu_q, const at::Tensor& log_sigma_q,
    const std::optional<at::Tensor>& mu_p, const std::optional<at::Tensor>& log_sigma_p, const at::Tensor& noise,
    bool residual);

}  // namespace nvae::residual_normal
