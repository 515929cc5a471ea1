#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace nvae::residual_normal {

// (z [B, Z, h, w], kl, log_q, log_p [B, Z] float32), `bias` [2 Z] added to mu_q and log_sigma_q; schemas and formulas: kernels/residual_normal.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward_cpu(
    const at::Tensor& mu_q, const at::Tensor& log_sigma_q, const std::optional<at::Tensor>& mu_p,
    const std::optional<at::Tensor>& log_sigma_p, const at::Tensor& noise, bool residual,
    const std::optional<at::Tensor>& bias);

// Gradients of (mu_q, log_sigma_q), and of (mu_p, log_sigma_p) when given, to which dmu_p and dlog_sigma_p are added; `joined`,
// those of a pair are the halves of one tensor. Behind them, where a bias [2 Z] is given, its gradient in float32.
std::vector<at::Tensor> backward_cpu(
    const std::optional<at::Tensor>& dz, const std::optional<at::Tensor>& dkl, const std::optional<at::Tensor>& dlog_q,
    const std::optional<at::Tensor>& dlog_p, const std::optional<at::Tensor>& dmu_p,
    const std::optional<at::Tensor>& dlog_sigma_p, const at::Tensor& mu_q, const at::Tensor& log_sigma_q,
    const std::optional<at::Tensor>& mu_p, const std::optional<at::Tensor>& log_sigma_p, const at::Tensor& noise,
    bool residual, bool joined, const std::optional<at::Tensor>& bias);

// log p [B, Z] of z and, given log q, log q - log p.
std::vector<at::Tensor> log_prob_forward_cpu(const at::Tensor& z, const std::optional<at::Tensor>& mu,
                                             const std::optional<at::Tensor>& log_sigma, const std::optional<at::Tensor>& log_q);

// Gradients of z, to which dz is added, and of mu and log_sigma when given.
std::vector<at::Tensor> log_prob_backward_cpu(const std::optional<at::Tensor>& dlog_p, const std::optional<at::Tensor>& dkl,
                                              const std::optional<at::Tensor>& dz, const at::Tensor& z,
                                              const std::optional<at::Tensor>& mu, const std::optional<at::Tensor>& log_sigma,
                                              bool joined);

}  // namespace nvae::residual_normal
