#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace nvae::bn_act {

// Schemas: kernels/bn_act/ops.py.
at::Tensor stats_cpu(const at::Tensor& x);
at::Tensor coefficients_cpu(const at::Tensor& stats, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                            double eps, const std::optional<at::Tensor>& running_mean, const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& batches, std::optional<double> rate, double count,
                            const std::optional<at::Tensor>& offset);
at::Tensor gradients_cpu(const at::Tensor& sums, const at::Tensor& bn, double count);
at::Tensor forward_cpu(const at::Tensor& x, const at::Tensor& bn, int64_t act);
at::Tensor sums_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bn, int64_t act, double count);
at::Tensor backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& bn, int64_t act, const at::Tensor& c,
                        const std::optional<at::Tensor>& also, const std::optional<at::Tensor>& also2);
void affine_cpu_(at::Tensor& du, const at::Tensor& x, const at::Tensor& c, const std::optional<at::Tensor>& also,
                 const std::optional<at::Tensor>& also2);

// From rows kTotal and kMoment of a table of gradients, the others: a gradient is averaged over `count` values (infinite, or 0: the
// statistics stand fixed).
void finish_gradients(const float* bn, int64_t channels, double count, float* table);

}  // namespace nvae::bn_act
