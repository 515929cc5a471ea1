// residual_normal on the CPU: any strides, float or bfloat16 storage, float arithmetic, one pass each way. A row (all of
// one batch element's channel) is summed in an order that depends on its length alone: not on the threads, not on the strides.
#include "residual_normal/residual_normal_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sub.h>

#include <algorithm>
#include <array>

#include "common/isa.h"
#include "common/math.h"
#include "residual_normal/residual_normal.h"

namespace nvae::residual_normal {
namespace {

#define NVAE_KERNEL "residual_normal/residual_normal_kernel.h"
#include "common/each_isa.h"

#include "residual_normal/tiles.h"

template <typename T>
struct Parameters {
  Image<const T> mu_q, log_sigma_q, mu_p, log_sigma_p;
  Image<const float> noise;
  bool residual;
  MaybeTensor bias[2];  // its halves as [B, Z], each element of the batch the same

  Parameters(const Tensor& mu_q, const Tensor& log_sigma_q, const MaybeTensor& mu_p, const MaybeTensor& log_sigma_p,
             const Tensor& noise, bool residual, const MaybeTensor& bias)
      : mu_q(mu_q), log_sigma_q(log_sigma_q), mu_p(mu_p), log_sigma_p(log_sigma_p), noise(noise), residual(residual) {
    const int64_t batch = mu_q.size(0), channels = mu_q.size(1);
    for (int k = 0; bias && k < 2; k++) this->bias[k] = bias->narrow(0, k * channels, channels).expand({batch, channels});
  }

  Inputs read(const Tile& tile, Scratch scratch, const Rows<2>& added) const {
    return {load(mu_q, tile, scratch[0]), load(log_sigma_q, tile, scratch[1]), load(mu_p, tile, scratch[2]),
            load(log_sigma_p, tile, scratch[3]), load(noise, tile, scratch[4]), added[0], added[1], tile.padded(), residual};
  }
};

template <typename T>
void forward(const Parameters<T>& in, const Tensor& z, const Tensor (&sums)[3]) {
  const auto run = NVAE_SELECT(forward_tile);
  const Image<T> out(z);
  const Plan plan(z);
  const auto added = [&](const Tile& task, Scratch scratch) { return of_rows(in.bias, plan, task, scratch, 6); };
  sum_rows(plan, sums, added, [&](const Tile& tile, Scratch scratch, const Rows<2>& bias, float** terms) {
    const Outputs o{target(out, tile, scratch[5]), terms[0], terms[1], terms[2]};
    run(in.read(tile, scratch, bias), o);
    store(out, tile, o.z);
  });
}

// `also`: what reaches the prior from elsewhere. dbias: where to put the sums [B, Z] of the first two outputs, if anywhere.
template <typename T>
void backward(const Parameters<T>& in, const MaybeTensor& dz, const MaybeTensor (&sums)[3], const MaybeTensor (&also)[2],
              const Tensor (&outputs)[4], const Tensor (&dbias)[2]) {
  const auto run = NVAE_SELECT(backward_tile);
  const Plan plan(outputs[0]);
  const Image<const T> dz_image(dz), also_image[2] = {Image<const T>(also[0]), Image<const T>(also[1])};
  Image<T> out[4];
  for (int k = 0; k < 4; k++)
    if (outputs[k].defined()) out[k] = Image<T>(outputs[k]);
  const MaybeTensor given[5] = {sums[0], sums[1], sums[2], in.bias[0], in.bias[1]};
  const auto rows_of = [&](const Tile& task, Scratch scratch) { return of_rows(given, plan, task, scratch, 6); };
  const auto of_tile = [&](const Tile& tile, Scratch scratch, const Rows<5>& rows, float** to) {
    for (int k = 0; k < 4; k++) to[k] = target(out[k], tile, scratch[11 + k]);
    run(in.read(tile, scratch, {rows[3], rows[4]}),
        {dz ? load(dz_image, tile, scratch[5]) : kZeros, rows[0], rows[1], rows[2], load(also_image[0], tile, scratch[15]),
         load(also_image[1], tile, scratch[16]), to[0], to[1], to[2], to[3]});
    for (int k = 0; k < 4; k++) store(out[k], tile, to[k]);
  };
  if (dbias[0].defined()) {
    return sum_rows(plan, dbias, rows_of, [&](const Tile& tile, Scratch scratch, const Rows<5>& rows, float** terms) {
      float* to[4];
      of_tile(tile, scratch, rows, to);
      std::copy_n(to, 2, terms);
    });
  }
  plan.run([&](int64_t, const Tile& task, Scratch scratch) {
    const Rows<5> rows = rows_of(task, scratch);
    float* to[4];
    plan.tiles(task, [&](const Tile& tile) { of_tile(tile, scratch, rows, to); });
  });
}

template <typename T>
struct Density {
  Image<const T> z, mu, log_sigma;

  DensityInputs read(const Tile& tile, Scratch scratch) const {
    return {load(z, tile, scratch[0]), load(mu, tile, scratch[1]), load(log_sigma, tile, scratch[2]), tile.padded()};
  }
};

template <typename T>
void log_prob_backward(const Density<T>& in, const MaybeTensor (&sums)[2], const MaybeTensor& also, const Tensor (&outputs)[3]) {
  const auto run = NVAE_SELECT(log_prob_backward_tile);
  const Plan plan(outputs[0]);
  const Image<const T> also_image(also);
  Image<T> out[3];
  for (int k = 0; k < 3; k++)
    if (outputs[k].defined()) out[k] = Image<T>(outputs[k]);
  plan.run([&](int64_t, const Tile& task, Scratch scratch) {
    const Rows<2> rows = of_rows(sums, plan, task, scratch, 6);
    plan.tiles(task, [&](const Tile& tile) {
      float* to[3];
      for (int k = 0; k < 3; k++) to[k] = target(out[k], tile, scratch[9 + k]);
      run(in.read(tile, scratch), {rows[0], rows[1], load(also_image, tile, scratch[3]), to[0], to[1], to[2]});
      for (int k = 0; k < 3; k++) store(out[k], tile, to[k]);
    });
  });
}

// Gradients of a pair mu and log sigma, added to `found`: one tensor each or, `joined`, the halves of one. Without a pair, none.
void add_pair(std::vector<Tensor>& found, Tensor* halves, const MaybeTensor& mu, const MaybeTensor& log_sigma, bool joined) {
  if (!mu) return;
  if (!joined) {
    found.push_back(halves[0] = at::empty_like(*mu));
    found.push_back(halves[1] = at::empty_like(*log_sigma));
    return;
  }
  const int64_t channels = mu->size(1);
  const auto format = mu->stride(1) == 1 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  found.push_back(at::empty({mu->size(0), 2 * channels, mu->size(2), mu->size(3)}, mu->options(), format));
  for (int k = 0; k < 2; k++) halves[k] = found.back().narrow(1, k * channels, channels);
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
                      const MaybeTensor& log_sigma_p, const Tensor& noise, const MaybeTensor& bias) {
  TORCH_CHECK(mu_q.dim() == 4, "residual_normal takes [B, Z, h, w], not ", mu_q.sizes());
  TORCH_CHECK(mu_p.has_value() == log_sigma_p.has_value(), "residual_normal takes both mu_p and log_sigma_p, or neither");
  check(mu_q, log_sigma_q, mu_q.scalar_type());
  check(mu_q, mu_p, mu_q.scalar_type());
  check(mu_q, log_sigma_p, mu_q.scalar_type());
  check(mu_q, noise, at::kFloat);
  const bool fits = !bias || (bias->dim() == 1 && bias->size(0) == 2 * mu_q.size(1) && bias->scalar_type() == at::kFloat);
  TORCH_CHECK(fits && (!bias || bias->device().is_cpu()), "residual_normal: bias has shape ", bias->sizes(), " and type ",
              bias->scalar_type(), "; expected float32 [", 2 * mu_q.size(1), "] on the CPU");
}

void check_density(const Tensor& z, const MaybeTensor& mu, const MaybeTensor& log_sigma) {
  TORCH_CHECK(z.dim() == 4, "normal_log_prob takes [B, Z, h, w], not ", z.sizes());
  TORCH_CHECK(mu.has_value() == log_sigma.has_value(), "normal_log_prob takes both mu and log_sigma, or neither");
  check(z, mu, z.scalar_type());
  check(z, log_sigma, z.scalar_type());
}

// Float sums [B, Z].
Tensor empty_sums(const Tensor& like) { return at::empty({like.size(0), like.size(1)}, like.options().dtype(at::kFloat)); }

// [2 Z] of two [B, Z].
Tensor sum_over_batch(const Tensor (&sums)[2]) {
  const int64_t batch = sums[0].size(0), channels = sums[0].size(1);
  const Tensor found = at::empty({2 * channels}, sums[0].options());
  float* to = found.data_ptr<float>();
  for (const Tensor& rows : sums) {
    const float* from = rows.const_data_ptr<float>();
    for (int64_t c = 0; c < channels; c++) {
      double sum = 0.0;
      for (int64_t b = 0; b < batch; b++) sum += from[b * channels + c];
      *to++ = static_cast<float>(sum);
    }
  }
  return found;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& mu_q, const Tensor& log_sigma_q,
                                                       const MaybeTensor& mu_p, const MaybeTensor& log_sigma_p,
                                                       const Tensor& noise, bool residual, const MaybeTensor& bias) {
  check_parameters(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, bias);
  const Tensor z = at::empty_like(mu_q), sums[3] = {empty_sums(mu_q), empty_sums(mu_q), empty_sums(mu_q)};
  with_dtype(mu_q, [&](auto tag) {
    using T = decltype(tag);
    forward(Parameters<T>(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, residual, bias),
            z, sums);
  });
  return {z, sums[0], sums[1], sums[2]};
}

std::vector<Tensor> backward_cpu(const MaybeTensor& dz, const MaybeTensor& dkl, const MaybeTensor& dlog_q,
                                 const MaybeTensor& dlog_p, const MaybeTensor& dmu_p, const MaybeTensor& dlog_sigma_p,
                                 const Tensor& mu_q, const Tensor& log_sigma_q, const MaybeTensor& mu_p,
                                 const MaybeTensor& log_sigma_p, const Tensor& noise, bool residual, bool joined,
                                 const MaybeTensor& bias) {
  check_parameters(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, bias);
  check(mu_q, dz, mu_q.scalar_type());
  TORCH_CHECK(dmu_p.has_value() == dlog_sigma_p.has_value() && (!dmu_p || mu_p),
              "residual_normal takes both dmu_p and dlog_sigma_p, with a prior, or neither");
  check(mu_q, dmu_p, mu_q.scalar_type());
  check(mu_q, dlog_sigma_p, mu_q.scalar_type());
  std::vector<Tensor> found;
  Tensor grads[4];
  add_pair(found, grads, mu_q, log_sigma_q, joined);
  add_pair(found, grads + 2, mu_p, log_sigma_p, joined);
  const MaybeTensor sums[3] = {dkl, dlog_q, dlog_p}, also[2] = {dmu_p, dlog_sigma_p};
  Tensor of_bias[2];
  if (bias)
    for (Tensor& t : of_bias) t = empty_sums(mu_q);
  with_dtype(mu_q, [&](auto tag) {
    using T = decltype(tag);
    backward(Parameters<T>(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, residual, bias),
             dz, sums, also, grads, of_bias);
  });
  if (bias) found.push_back(sum_over_batch(of_bias));
  return found;
}

std::vector<Tensor> log_prob_forward_cpu(const Tensor& z, const MaybeTensor& mu, const MaybeTensor& log_sigma,
                                         const MaybeTensor& log_q) {
  check_density(z, mu, log_sigma);
  const auto run = NVAE_SELECT(log_prob_forward_tile);
  const Tensor sums[1] = {empty_sums(z)};
  with_dtype(z, [&](auto tag) {
    using T = decltype(tag);
    const Density<T> in{Image<const T>(z), Image<const T>(mu), Image<const T>(log_sigma)};
    const auto nothing = [](const Tile&, Scratch) { return 0; };
    sum_rows(Plan(z), sums, nothing,
             [&](const Tile& tile, Scratch scratch, int, float** terms) { run(in.read(tile, scratch), terms[0]); });
  });
  if (!log_q) return {sums[0]};
  return {sums[0], at::sub(*log_q, sums[0])};
}

std::vector<Tensor> log_prob_backward_cpu(const MaybeTensor& dlog_p, const MaybeTensor& dkl, const MaybeTensor& dz, const Tensor& z,
                                          const MaybeTensor& mu, const MaybeTensor& log_sigma, bool joined) {
  check_density(z, mu, log_sigma);
  check(z, dz, z.scalar_type());
  std::vector<Tensor> found;
  Tensor grads[3] = {at::empty_like(z)};
  found.push_back(grads[0]);
  add_pair(found, grads + 1, mu, log_sigma, joined);
  const MaybeTensor sums[2] = {dlog_p, dkl};
  with_dtype(z, [&](auto tag) {
    using T = decltype(tag);
    log_prob_backward(Density<T>{Image<const T>(z), Image<const T>(mu), Image<const T>(log_sigma)}, sums, dz, grads);
  });
  return found;
}

}  // namespace nvae::residual_normal
