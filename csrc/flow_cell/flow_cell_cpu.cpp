// flow_cell on the CPU: float and channels-last inside, whatever comes in. A batch is cut into up to 16 tasks;
// the gradients of the weights are kept per task and added in the order of the tasks: the same bits for any number of threads.
#include "flow_cell/flow_cell_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>

#include "cpu/kernels.h"

namespace nvae::flow_cell {
namespace {

using at::Tensor;

bool is_float(const Tensor& t) { return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16; }

Shape checked(const Tensor& z, const Tensor& w_in, const Tensor& w_dw, const Tensor& w_out, const Tensor& bias) {
  TORCH_CHECK(z.dim() == 4 && w_in.dim() == 4, "flow_cell takes z [B, Z, H, W] and w_in [E, Z, 3, 3], not ", z.sizes(), " and ",
              w_in.sizes());
  const int64_t c = z.size(1), e = w_in.size(0);
  TORCH_CHECK(w_in.sizes() == at::IntArrayRef({e, c, 3, 3}) && w_dw.sizes() == at::IntArrayRef({e, 1, 5, 5}) &&
                  w_out.sizes() == at::IntArrayRef({c, e, 1, 1}) && bias.sizes() == at::IntArrayRef({c}),
              "flow_cell: weights of shapes ", w_in.sizes(), ", ", w_dw.sizes(), ", ", w_out.sizes(), " and ", bias.sizes(),
              " do not fit z of ", z.sizes());
  for (const Tensor* t : {&z, &w_in, &w_dw, &w_out, &bias})
    TORCH_CHECK(t->device().is_cpu() && is_float(*t), "flow_cell takes float32 or bfloat16 on the CPU, not ", t->scalar_type());
  return {z.size(0), static_cast<int>(z.size(2)), static_cast<int>(z.size(3)), static_cast<int>(c), static_cast<int>(e)};
}

// Owns what `Weights` points to.
struct Packed {
  Tensor memory, bias;
  Weights view{};
};

Packed pack(const Shape& s, const Tensor& w_in, const Tensor& w_dw, const Tensor& w_out, const Tensor& bias) {
  const int64_t L = cpu_kernels().flow_cell.lanes, blocks = (s.e + L - 1) / L, z = s.z, zv = (z + L - 1) / L * L;
  const auto dense = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const Tensor in = dense(w_in), dw = dense(w_dw), out = dense(w_out);
  const float *pi = in.const_data_ptr<float>(), *pd = dw.const_data_ptr<float>(), *po = out.const_data_ptr<float>();
  Packed p;
  p.memory = at::zeros({blocks * L * (10 * z + 10 * zv + 25)}, in.options());
  p.bias = dense(bias);
  float* to_in = p.memory.data_ptr<float>();
  float *to_back = to_in + blocks * 9 * z * L, *to_dw = to_back + blocks * 9 * zv * L, *to_out = to_dw + blocks * 25 * L;
  float* to_fwd = to_out + blocks * z * L;
  p.view = {to_in, to_back, to_dw, to_out, to_fwd, p.bias.const_data_ptr<float>(), {3, 3, 3}, {}, {}};
  bool live[9] = {};
  for (int64_t e = 0; e < s.e; e++) {
    const int64_t b = e / L, l = e % L;
    for (int64_t c = 0; c < z; c++) {
      for (int t = 0; t < 9; t++) {
        const float v = pi[(e * z + c) * 9 + t];
        live[t] |= v != 0;
        to_in[((b * 9 + t) * z + c) * L + l] = v;
        to_back[((b * 9 + t / 3 * 3 + 2 - t % 3) * L + l) * zv + c] = v;
      }
      to_out[(b * z + c) * L + l] = to_fwd[(b * L + l) * zv + c] = po[c * s.e + e];
    }
    for (int t = 0; t < 25; t++) {
      p.view.live[t] |= pd[e * 25 + t] != 0;
      to_dw[(b * 25 + t) * L + l] = pd[e * 25 + t];
    }
  }
  for (int t = 8; t >= 0; t--)
    if (live[t]) {
      p.view.first[t / 3] = t % 3;
      p.view.last[t / 3] = std::max(p.view.last[t / 3], t % 3 + 1);
    }
  return p;
}

Tensor wide(const Tensor& t) { return t.to(at::kFloat).contiguous(at::MemoryFormat::ChannelsLast); }

// Where the kernel writes what becomes `result`: in place where the layout and the type allow it.
Tensor wide_like(const Tensor& result) {
  if (result.scalar_type() == at::kFloat && result.is_contiguous(at::MemoryFormat::ChannelsLast)) return result;
  return at::empty(result.sizes(), result.options().dtype(at::kFloat), at::MemoryFormat::ChannelsLast);
}

int64_t tasks(const Shape& s) { return (s.n + images_of_task(s) - 1) / images_of_task(s); }

// f(task, images, elements before the task's first, scratch)
template <typename F>
void for_each_task(const Shape& s, const F& f) {
  const int64_t images = images_of_task(s), image = static_cast<int64_t>(s.h) * s.w * s.z;
  at::parallel_for(0, tasks(s), 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = (cpu_kernels().flow_cell.scratch_floats(s) * sizeof(float) + 63) / 64 * 64;
    const std::unique_ptr<float, decltype(&std::free)> scratch(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
    for (int64_t i = begin; i < end; i++) f(i, std::min(images, s.n - i * images), i * images * image, scratch.get());
  });
}

// y, the output of a cell, which has the sizes of z.
void forward(const Tensor& z, const Tensor& w_in, const Tensor& w_dw, const Tensor& w_out, const Tensor& bias_out,
             const Tensor& y) {
  const Shape s = checked(z, w_in, w_dw, w_out, bias_out);
  if (!y.numel()) return;
  const Tensor x = wide(z), target = wide_like(y);
  const Packed weights = pack(s, w_in, w_dw, w_out, bias_out);
  const float* from = x.const_data_ptr<float>();
  float* to = target.data_ptr<float>();
  for_each_task(s, [&](int64_t, int64_t images, int64_t at, float* scratch) {
    cpu_kernels().flow_cell.forward(s, weights.view, images, from + at, to + at, scratch);
  });
  if (!target.is_same(y)) y.copy_(target);
}

// dz, which has the sizes of z, and the gradients of the weights; that of w_in is laid out like `like`.
std::array<Tensor, 4> backward(const Tensor& dy, const Tensor& z, const Tensor& w_in, const Tensor& w_dw, const Tensor& w_out,
                               const Tensor& bias_out, const Tensor& like, const Tensor& dz) {
  const Shape s = checked(z, w_in, w_dw, w_out, bias_out);
  TORCH_CHECK(dy.sizes() == z.sizes() && dy.device().is_cpu() && is_float(dy), "flow_cell: a gradient of shape ", dy.sizes(),
              " and type ", dy.scalar_type(), " does not fit");
  const auto f32 = z.options().dtype(at::kFloat);
  const Tensor d_in = at::zeros_like(like, f32), d_dw = at::zeros(w_dw.sizes(), f32);
  const Tensor d_out = at::zeros(w_out.sizes(), f32), d_bias = at::zeros(bias_out.sizes(), f32);
  if (z.numel()) {
    const Tensor g = wide(dy), x = wide(z), target = wide_like(dz);
    const Packed weights = pack(s, w_in, w_dw, w_out, bias_out);
    const int64_t L = cpu_kernels().flow_cell.lanes, rows = gradient_rows(s), c = s.z, e = s.e;
    const int64_t parts = (e + L - 1) / L * rows * L + c;
    const Tensor partial = at::empty({tasks(s), parts}, f32), sums = at::empty({parts}, f32);
    const float *gradient = g.const_data_ptr<float>(), *from = x.const_data_ptr<float>();
    float *to = target.data_ptr<float>(), *part = partial.data_ptr<float>(), *sum = sums.data_ptr<float>();
    for_each_task(s, [&](int64_t i, int64_t images, int64_t at, float* scratch) {
      cpu_kernels().flow_cell.backward(s, weights.view, images, gradient + at, from + at, to + at, part + i * parts, scratch);
    });
    if (!target.is_same(dz)) dz.copy_(target);
    at::parallel_for(0, parts, 4096, [&](int64_t begin, int64_t end) {
      std::copy(part + begin, part + end, sum + begin);
      for (int64_t i = 1; i < tasks(s); i++)
        for (int64_t j = begin; j < end; j++) sum[j] += part[i * parts + j];
    });
    float *to_in = d_in.data_ptr<float>(), *to_dw = d_dw.data_ptr<float>(), *to_out = d_out.data_ptr<float>();
    for (int64_t i = 0; i < e; i++) {
      const float* of = sum + i / L * rows * L + i % L;
      for (int64_t j = 0; j < c; j++) {
        for (int64_t t = 0; t < 9; t++)
          to_in[i * d_in.stride(0) + j * d_in.stride(1) + t / 3 * d_in.stride(2) + t % 3 * d_in.stride(3)] = of[(t * c + j) * L];
        to_out[j * e + i] = -of[(9 * c + 25 + j) * L];
      }
      for (int64_t t = 0; t < 25; t++) to_dw[i * 25 + t] = of[(9 * c + t) * L];
    }
    for (int64_t j = 0; j < c; j++) d_bias.data_ptr<float>()[j] = -sum[parts - c + j];
  }
  return {d_in.to(w_in.scalar_type()), d_dw.to(w_dw.scalar_type()), d_out.to(w_out.scalar_type()),
          d_bias.to(bias_out.scalar_type())};
}

int64_t cells(at::TensorList weights) {
  TORCH_CHECK(!weights.empty() && weights.size() % 4 == 0, "flow_cell takes four weights a cell, not ", weights.size());
  return static_cast<int64_t>(weights.size() / 4);
}

Tensor between(const Tensor& z) { return at::empty_like(z, z.options(), at::MemoryFormat::ChannelsLast); }

}  // namespace

std::vector<Tensor> forward_cpu(const Tensor& z, at::TensorList weights) {
  const int64_t count = cells(weights);
  TORCH_CHECK(z.dim() == 4, "flow_cell takes z [B, Z, H, W], not ", z.sizes());
  std::vector<Tensor> found;
  for (int64_t k = 0; k < count; k++) {
    const at::TensorList w = weights.slice(4 * k, 4);
    const Tensor from = k ? found.back() : z;
    found.push_back(k + 1 < count ? between(z) : at::empty_like(z));
    forward(from, w[0], w[1], w[2], w[3], found.back());
  }
  return found;
}

std::vector<Tensor> backward_cpu(const Tensor& dy, at::TensorList zs, at::TensorList weights) {
  const int64_t count = cells(weights);
  TORCH_CHECK(zs.size() == weights.size() / 4, "flow_cell: ", zs.size(), " images and weights of ", count, " cells");
  std::vector<Tensor> found(1 + weights.size());
  Tensor gradient = dy;
  for (int64_t k = count - 1; k >= 0; k--) {
    const at::TensorList w = weights.slice(4 * k, 4);
    const Tensor dz = k ? between(zs[k]) : at::empty_like(zs[0]);
    auto of_weights = backward(gradient, zs[k], w[0], w[1], w[2], w[3], weights[0], dz);
    std::move(of_weights.begin(), of_weights.end(), found.begin() + 1 + 4 * k);
    gradient = dz;
  }
  found[0] = gradient;
  return found;
}

}  // namespace nvae::flow_cell
