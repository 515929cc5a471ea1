// residual_normal on the CPU: any strides, float or bfloat16 storage, float arithmetic, one pass each way. A row (all of
// one batch element's channel) is summed by one thread in a fixed order, so results do not depend on the thread count.
#include "residual_normal/residual_normal_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "common/isa.h"
#include "common/math.h"
#include "common/rows.h"
#include "residual_normal/residual_normal.h"

namespace nvae::residual_normal {
namespace {

#define NVAE_KERNEL "residual_normal/residual_normal_kernel.h"
#include "common/each_isa.h"

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Base pointer and strides of a [B, Z, h, w] tensor; a null pointer for an absent one.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t stride_b = 0, stride_z = 0, stride_h = 0, stride_w = 0, w = 1;

  Rows() = default;
  explicit Rows(const Tensor& t)
      : data(t.data_ptr<std::remove_const_t<T>>()),
        stride_b(t.stride(0)), stride_z(t.stride(1)), stride_h(t.stride(2)), stride_w(t.stride(3)),
        w(std::max<int64_t>(t.size(3), 1)) {}
  explicit Rows(const MaybeTensor& t) : Rows(t ? Rows(*t) : Rows()) {}

  Plane<T> row(int64_t b, int64_t z) const { return {data + b * stride_b + z * stride_z, stride_h, stride_w, w}; }
};

// A [B, Z] gradient of any strides; zero when absent.
struct RowScalars {
  const float* data = nullptr;
  int64_t stride_b = 0, stride_z = 0;

  explicit RowScalars(const MaybeTensor& t) {
    if (t) data = t->const_data_ptr<float>(), stride_b = t->stride(0), stride_z = t->stride(1);
  }
  float at(int64_t b, int64_t z) const { return data ? data[b * stride_b + z * stride_z] : 0.0f; }
};

template <typename T>
struct Parameters {
  Rows<const T> mu_q, log_sigma_q, mu_p, log_sigma_p;
  Rows<const float> noise;
  bool residual;

  Inputs block(int64_t b, int64_t z, int64_t start, int64_t n, float (*scratch)[kBlock]) const {
    const auto part = [&](const auto& rows, int i) {
      return rows.data ? load(rows.row(b, z), start, n, scratch[i]) : nullptr;
    };
    return {part(mu_q, 0), part(log_sigma_q, 1), part(mu_p, 2), part(log_sigma_p, 3), part(noise, 4),
            static_cast<int>(n), residual};
  }
};

// f(b, z) for every row, in parallel, a few thousand elements to a task.
template <typename F>
void for_each_row(const Tensor& like, const F& f) {
  const int64_t channels = like.size(1), area = std::max<int64_t>(like.size(2) * like.size(3), 1);
  at::parallel_for(0, like.size(0) * channels, std::max<int64_t>(1, 4096 / area), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) f(r / channels, r % channels);
  });
}

template <typename T>
void forward(const Parameters<T>& in, Tensor& z, Tensor& kl, Tensor& log_q, Tensor& log_p) {
  const auto run = NVAE_SELECT(forward_block);
  const Rows<T> out(z);
  const int64_t area = z.size(2) * z.size(3), channels = z.size(1);
  float *kl_out = kl.data_ptr<float>(), *log_q_out = log_q.data_ptr<float>(), *log_p_out = log_p.data_ptr<float>();
  for_each_row(z, [&](int64_t b, int64_t c) {
    alignas(64) float scratch[6][kBlock];
    double sums[3] = {};
    const Plane<T> row = out.row(b, c);
    for (int64_t start = 0; start < area; start += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, area - start);
      float* target_z = target(row, start, scratch[5]);
      const Sums s = run(in.block(b, c, start, n, scratch), target_z);
      store(row, start, n, target_z);
      sums[0] += s.kl, sums[1] += s.log_q, sums[2] += s.log_p;
    }
    const int64_t i = b * channels + c;
    kl_out[i] = static_cast<float>(sums[0]);
    log_q_out[i] = static_cast<float>(sums[1]);
    log_p_out[i] = static_cast<float>(sums[2]);
  });
}

template <typename T>
void backward(const Parameters<T>& in, const MaybeTensor& dz, const RowScalars (&row_grads)[3],
              const std::vector<Tensor>& outputs) {
  const auto run = NVAE_SELECT(backward_block);
  const Rows<const T> dz_rows(dz);
  const int64_t area = outputs[0].size(2) * outputs[0].size(3);
  const int count = static_cast<int>(outputs.size());
  Rows<T> out[4];
  for (int k = 0; k < count; k++) out[k] = Rows<T>(outputs[k]);
  for_each_row(outputs[0], [&](int64_t b, int64_t c) {
    alignas(64) float scratch[10][kBlock];
    if (!dz) std::fill_n(scratch[5], kBlock, 0.0f);
    Gradients g{};
    g.row = {row_grads[0].at(b, c), row_grads[1].at(b, c), row_grads[2].at(b, c)};
    for (int64_t start = 0; start < area; start += kBlock) {
      const int64_t n = std::min<int64_t>(kBlock, area - start);
      float* targets[4] = {};
      for (int k = 0; k < count; k++) targets[k] = target(out[k].row(b, c), start, scratch[6 + k]);
      g.dz = dz ? load(dz_rows.row(b, c), start, n, scratch[5]) : scratch[5];
      g.mu_q = targets[0], g.log_sigma_q = targets[1], g.mu_p = targets[2], g.log_sigma_p = targets[3];
      run(in.block(b, c, start, n, scratch), g);
      for (int k = 0; k < count; k++) store(out[k].row(b, c), start, n, targets[k]);
    }
  });
}

template <typename F>
void with_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == at::kFloat) return f(float{});
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "residual_normal takes float32 or bfloat16, not ", t.scalar_type());
  f(at::BFloat16{});
}

void check(const Tensor& model, const MaybeTensor& t, at::ScalarType dtype) {
  TORCH_CHECK(!t || (t->sizes() == model.sizes() && t->scalar_type() == dtype && t->device().is_cpu()),
              "residual_normal: a tensor of shape ", t->sizes(), " and type ", t->scalar_type(), " where ", model.sizes(),
              " and ", dtype, " on the CPU was expected");
}

void check_parameters(const Tensor& mu_q, const Tensor& log_sigma_q, const MaybeTensor& mu_p,
                      const MaybeTensor& log_sigma_p, const Tensor& noise) {
  TORCH_CHECK(mu_q.dim() == 4, "residual_normal takes [B, Z, h, w], not ", mu_q.sizes());
  TORCH_CHECK(mu_p.has_value() == log_sigma_p.has_value(), "residual_normal takes both mu_p and log_sigma_p, or neither");
  check(mu_q, log_sigma_q, mu_q.scalar_type());
  check(mu_q, mu_p, mu_q.scalar_type());
  check(mu_q, log_sigma_p, mu_q.scalar_type());
  check(mu_q, noise, at::kFloat);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& mu_q, const Tensor& log_sigma_q,
                                                       const MaybeTensor& mu_p, const MaybeTensor& log_sigma_p,
                                                       const Tensor& noise, bool residual) {
  check_parameters(mu_q, log_sigma_q, mu_p, log_sigma_p, noise);
  Tensor z = at::empty_like(mu_q);
  Tensor sums[3];
  for (Tensor& s : sums) s = at::empty({mu_q.size(0), mu_q.size(1)}, mu_q.options().dtype(at::kFloat));
  with_dtype(mu_q, [&](auto tag) {
    using T = decltype(tag);
    forward(Parameters<T>{Rows<const T>(mu_q), Rows<const T>(log_sigma_q), Rows<const T>(mu_p),
                          Rows<const T>(log_sigma_p), Rows<const float>(noise), residual},
            z, sums[0], sums[1], sums[2]);
  });
  return {z, sums[0], sums[1], sums[2]};
}

std::vector<Tensor> backward_cpu(const MaybeTensor& dz, const MaybeTensor& dkl, const MaybeTensor& dlog_q,
                                 const MaybeTensor& dlog_p, const Tensor& mu_q, const Tensor& log_sigma_q,
                                 const MaybeTensor& mu_p, const MaybeTensor& log_sigma_p, const Tensor& noise,
                                 bool residual) {
  check_parameters(mu_q, log_sigma_q, mu_p, log_sigma_p, noise);
  check(mu_q, dz, mu_q.scalar_type());
  std::vector<Tensor> grads{at::empty_like(mu_q), at::empty_like(log_sigma_q)};
  if (mu_p) grads.push_back(at::empty_like(*mu_p)), grads.push_back(at::empty_like(*log_sigma_p));
  const RowScalars row_grads[3] = {RowScalars(dkl), RowScalars(dlog_q), RowScalars(dlog_p)};
  with_dtype(mu_q, [&](auto tag) {
    using T = decltype(tag);
    backward(Parameters<T>{Rows<const T>(mu_q), Rows<const T>(log_sigma_q), Rows<const T>(mu_p),
                           Rows<const T>(log_sigma_p), Rows<const float>(noise), residual},
             dz, row_grads, grads);
  });
  return grads;
}

}  // namespace nvae::residual_normal
