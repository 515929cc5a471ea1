// depthwise_conv on the CPU: channels-last inside, float or bfloat16 storage, float arithmetic. A task is one image and one block
// of channels, its sums are taken in a fixed order: the same bits for any number of threads.
#include "depthwise_conv/depthwise_conv_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <cstdlib>
#include <memory>

#include "cpu/kernels.h"

namespace nvae::depthwise_conv {
namespace {

using at::Tensor;

void check(const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation) {
  TORCH_CHECK(x.dim() == 4 && x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "depthwise_conv takes [N, C, H, W] float32 or bfloat16 on the CPU, not ", x.sizes(), " ", x.scalar_type());
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                  weight.size(2) % 2 == 1 && weight.size(2) <= kMaxKernel,
              "depthwise_conv takes a weight [C, 1, k, k] with k odd and at most ", kMaxKernel, ", not ", weight.sizes());
  TORCH_CHECK((stride == 1 || stride == 2) && dilation >= 1, "depthwise_conv takes stride 1 or 2 and a positive dilation, not ",
              stride, " and ", dilation);
}

Shape shape_of(const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation) {
  const auto out = [&](int64_t side) { return static_cast<int>(side ? (side - 1) / stride + 1 : 0); };
  return {x.size(0), x.size(1), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), out(x.size(2)), out(x.size(3)),
          static_cast<int>(weight.size(2)), static_cast<int>(stride), static_cast<int>(dilation), 0};
}

// [C, 1, k, k] as the kernels read it: [k * k][C] floats.
Tensor taps_first(const Tensor& weight) { return weight.to(at::kFloat).flatten(1).t().contiguous(); }

template <typename F>
void for_each_task(const Shape& s, const F& f) {
  const int64_t lanes = cpu_kernels().depthwise_conv.lanes, tasks = s.n * ((s.c + lanes - 1) / lanes);
  if (s.out_h * s.out_w == 0) return;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const size_t bytes = (scratch_floats(s) * sizeof(float) + 63) / 64 * 64;
    const std::unique_ptr<float, decltype(&std::free)> scratch(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
    for (int64_t i = begin; i < end; i++) f(i, scratch.get());
  });
}

uint16_t* half(const Tensor& t) { return reinterpret_cast<uint16_t*>(t.data_ptr()); }

}  // namespace

Tensor forward_cpu(const Tensor& x_any, const Tensor& weight, int64_t stride, int64_t dilation) {
  check(x_any, weight, stride, dilation);
  const Tensor x = x_any.contiguous(at::MemoryFormat::ChannelsLast), taps = taps_first(weight);
  const Shape s = shape_of(x, weight, stride, dilation);
  const Tensor y = at::empty({s.n, s.c, s.out_h, s.out_w}, x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor one = at::ones({s.c}, taps.options()), zero = at::zeros({s.c}, taps.options());
  const float *scale = one.const_data_ptr<float>(), *shift = zero.const_data_ptr<float>(), *w = taps.const_data_ptr<float>();
  const Kernels& kernels = cpu_kernels().depthwise_conv;
  if (x.scalar_type() == at::kFloat) {
    const Forward<float> f{x.const_data_ptr<float>(), scale, shift, w, y.data_ptr<float>(), nullptr};
    for_each_task(s, [&](int64_t task, float* scratch) { kernels.forward_f32(s, f, task, scratch); });
  } else {
    const Forward<uint16_t> f{half(x), scale, shift, w, half(y), nullptr};
    for_each_task(s, [&](int64_t task, float* scratch) { kernels.forward_bf16(s, f, task, scratch); });
  }
  return y;
}

std::tuple<Tensor, Tensor> backward_cpu(const Tensor& dy_any, const Tensor& x_any, const Tensor& weight, int64_t stride,
                                        int64_t dilation) {
  check(x_any, weight, stride, dilation);
  const Tensor x = x_any.contiguous(at::MemoryFormat::ChannelsLast), taps = taps_first(weight);
  const Shape s = shape_of(x, weight, stride, dilation);
  TORCH_CHECK(dy_any.sizes() == at::IntArrayRef({s.n, s.c, s.out_h, s.out_w}) && dy_any.scalar_type() == x.scalar_type(),
              "depthwise_conv: a gradient of shape ", dy_any.sizes(), " and type ", dy_any.scalar_type(), " does not fit");
  const Tensor dy = dy_any.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t k = weight.size(2);
  const Tensor dx = at::empty(x.sizes(), x.options(), at::MemoryFormat::ChannelsLast);
  const Tensor partial = at::zeros({s.n, k * k, s.c}, taps.options());
  const Tensor one = at::ones({s.c}, taps.options()), zero = at::zeros({s.c}, taps.options());
  const float *scale = one.const_data_ptr<float>(), *none = zero.const_data_ptr<float>(), *w = taps.const_data_ptr<float>();
  float* dw = partial.data_ptr<float>();
  const Kernels& kernels = cpu_kernels().depthwise_conv;
  if (x.scalar_type() == at::kFloat) {
    const Backward<float> f{dy.const_data_ptr<float>(), nullptr, x.const_data_ptr<float>(), scale, none, none, w,
                            nullptr, nullptr, nullptr, dx.data_ptr<float>(), nullptr, dw};
    for_each_task(s, [&](int64_t task, float* scratch) { kernels.backward_f32(s, f, task, scratch); });
  } else {
    const Backward<uint16_t> f{half(dy), nullptr, half(x), scale, none, none, w, nullptr, nullptr, nullptr, half(dx), nullptr, dw};
    for_each_task(s, [&](int64_t task, float* scratch) { kernels.backward_bf16(s, f, task, scratch); });
  }
  return {dx, partial.sum(0).t().reshape(weight.sizes()).to(weight.scalar_type()).contiguous()};
}

}  // namespace nvae::depthwise_conv
