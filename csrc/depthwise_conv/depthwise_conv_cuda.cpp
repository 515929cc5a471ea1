// depthwise_conv on a GPU: from torch's tensors to the launchers of depthwise_cuda.h. Part of CUDA builds alone (setup.py).
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "bn_act/bn_act.h"
#include "depthwise_conv/depthwise_conv_cuda.h"
#include "depthwise_conv/depthwise_cuda.h"

namespace nvae::depthwise_conv::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "depthwise_conv";

int storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat;
    case at::kBFloat16: return kBfloat16;
    case at::kHalf: return kHalf;
    default: TORCH_CHECK(false, kOp, ": x is ", x.scalar_type(), "; the CUDA code takes float32, bfloat16 or float16");
  }
}

void check_beside(const char* name, const Tensor& t, const Tensor& x, at::ScalarType type, at::IntArrayRef sizes) {
  TORCH_CHECK(t.device() == x.device() && t.scalar_type() == type && t.sizes() == sizes, kOp, ": ", name, " has shape ", t.sizes(),
              ", type ", t.scalar_type(), " and lies on ", t.device(), "; expected ", sizes, ", ", type, " and ", x.device());
}
// Dense and channels-last, sizes and type as given.
Tensor image_like(const char* name, const Tensor& t, const Tensor& x, at::IntArrayRef sizes) {
  check_beside(name, t, x, x.scalar_type(), sizes);
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}
OptionalTensor floats(const char* name, const OptionalTensor& t, const Tensor& x, at::IntArrayRef sizes) {
  if (!t) return {};
  check_beside(name, *t, x, at::kFloat, sizes);
  return t->contiguous();
}
const float* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

Problem problem_of(const Tensor& x, const Tensor& weight, int64_t act, int64_t stride, int64_t dilation, int64_t up, int64_t variant) {
  TORCH_CHECK(x.is_cuda() && x.dim() == 4, kOp, ": x has shape ", x.sizes(), " and lies on ", x.device(),
              "; expected [N, C, H, W] on a GPU");
  const int64_t k = weight.dim() == 4 ? weight.size(2) : 0;
  check_beside("weight", weight, x, x.scalar_type(), {x.size(1), 1, k, k});
  constexpr int64_t kMost = std::numeric_limits<int>::max() / (4 * kMaxKernel);  // a tap's distance is an int
  TORCH_CHECK(x.size(2) <= kMost && x.size(3) <= kMost, kOp, ": x has shape ", x.sizes(), "; expected sides of at most ", kMost);
  const int64_t h = x.size(2) * up, w = x.size(3) * up;
  // Further apart than the image, all taps but the middle one lie outside.
  dilation = std::min(dilation, std::max<int64_t>({h, w, 1}));
  const auto out = [&](int64_t side) { return static_cast<int>(side && stride ? (side - 1) / stride + 1 : 0); };
  const Problem p{x.size(0), x.size(1), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), out(h), out(w), static_cast<int>(k),
                  static_cast<int>(stride), static_cast<int>(dilation), static_cast<int>(up), static_cast<int>(act), storage_of(x),
                  static_cast<int>(variant)};
  const char* why = refusal(p);
  TORCH_CHECK(why == nullptr, kOp, ": kernel ", k, ", stride ", stride, ", dilation ", dilation, ", upsample ", up, ", variant ", variant,
              "; ", why);
  return p;
}

Tensor empty_image(const Tensor& like, at::IntArrayRef sizes) { return at::empty(sizes, like.options(), at::MemoryFormat::ChannelsLast); }

// Launches with scratch of its own, which the caching allocator hands to nobody before this stream is done with it, and with the
// caller's tickets, which no other stream may use meanwhile.
template <typename Arguments>
void run(const Problem& p, Arguments arguments, const Tensor& x, const Tensor& tickets) {
  TORCH_CHECK(tickets.device() == x.device() && tickets.scalar_type() == at::kInt && tickets.is_contiguous() &&
                  tickets.numel() >= tickets_of(p), kOp, ": expected ", tickets_of(p), " tickets of type int on ", x.device());
  TORCH_CHECK(chosen(p, arguments) != kAuto, kOp, ": variant ", p.variant, " cannot run this shape, type or alignment; pass 0");
  const Tensor scratch = at::empty({scratch_floats(p, arguments)}, x.options().dtype(at::kFloat));
  arguments.scratch = scratch.data_ptr<float>();
  arguments.tickets = reinterpret_cast<unsigned*>(tickets.data_ptr<int>());
  C10_CUDA_CHECK(launch(p, arguments, c10::cuda::getCurrentCUDAStream(x.device().index())));
}

// A running statistic: where it lies, from value to value, and its type.
std::tuple<void*, int64_t, int> running(const OptionalTensor& t, const Tensor& x, int64_t c) {
  if (!t) return {nullptr, 0, kFloat};
  TORCH_CHECK(t->device() == x.device() && t->sizes() == at::IntArrayRef{c}, kOp, ": running statistics have shape ", t->sizes(),
              " and lie on ", t->device(), "; expected [", c, "] and ", x.device());
  return {t->data_ptr(), t->stride(0), t->scalar_type() == at::kDouble ? static_cast<int>(kDouble) : storage_of(*t)};
}

using Coefficients = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, double, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, std::optional<double>, double, const OptionalTensor&);

std::tuple<Tensor, Tensor> forward(const Tensor& tickets, const Tensor& x_any, const OptionalTensor& bn_any, int64_t act,
                                   const Tensor& weight_any, int64_t stride, int64_t dilation, int64_t upsample, bool stats,
                                   at::ArrayRef<double> numbers, const OptionalTensor& next_weight, const OptionalTensor& next_bias,
                                   const OptionalTensor& next_offset, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, const OptionalTensor& batches, int64_t variant) {
  const Problem p = problem_of(x_any, weight_any, act, stride, dilation, upsample, variant);
  const c10::cuda::CUDAGuard device(x_any.device());
  const Tensor x = image_like("x", x_any, x_any, x_any.sizes()), weight = weight_any.contiguous();
  const OptionalTensor bn = floats("coefficients", bn_any, x, {bn_act::kCoefficients, p.c});
  const Tensor y = empty_image(x, {p.n, p.c, p.out_h, p.out_w});
  const auto table = x.options().dtype(at::kFloat);
  const bool followed = stats && !numbers.empty();
  TORCH_CHECK(!followed || numbers.size() == 3, kOp, ": expected 3 numbers, eps, momentum and copies, not ", numbers.size());
  if (y.numel() == 0) {
    const Tensor zeros = at::zeros({stats ? 2 : 0, p.c}, table);
    if (!followed) return {y, zeros};
    static const auto coefficients =
        c10::Dispatcher::singleton().findSchemaOrThrow("nvae_fast::bn_act_coefficients", "").typed<Coefficients>();
    return {y, coefficients.call(zeros, next_weight, next_bias, numbers[0], running_mean, running_var, batches, numbers[1], 0.0,
                                 next_offset)};
  }
  Following next{};
  OptionalTensor kept[3];  // dense, while it is launched
  if (followed) {
    const double count = static_cast<double>(p.n) * p.out_h * p.out_w * numbers[2];
    int i = 0;
    for (const auto& [name, t, to] : {std::tuple{"weight", &next_weight, &next.weight}, std::tuple{"bias", &next_bias, &next.bias},
                                      std::tuple{"offset", &next_offset, &next.offset}})
      kept[i] = floats(name, *t, x, {p.c}), *to = pointer(kept[i++]);
    TORCH_CHECK(running_mean.has_value() == running_var.has_value(), kOp, ": expected both running_mean and running_var, or neither");
    TORCH_CHECK(!batches || (batches->numel() == 1 && batches->scalar_type() == at::kLong && batches->device() == x.device()), kOp,
                ": the number of batches has shape ", batches->sizes(), "; expected a scalar of type long on ", x.device());
    std::tie(next.mean, next.mean_stride, next.mean_type) = running(running_mean, x, p.c);
    std::tie(next.var, next.var_stride, next.var_type) = running(running_var, x, p.c);
    next.batches = batches ? batches->data_ptr<int64_t>() : nullptr;
    next.eps = numbers[0], next.rate = numbers[1], next.unbiased = count / std::max(count - 1.0, 1.0);
  }
  const Tensor found = at::empty({stats ? (followed ? bn_act::kCoefficients : 2) : 0, p.c}, table);
  float* const stats_to = stats ? found.data_ptr<float>() : nullptr;
  run(p, Forward{x.const_data_ptr(), pointer(bn), weight.const_data_ptr(), y.data_ptr(), stats_to, followed, next, nullptr, nullptr}, x, tickets);
  return {y, found};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& tickets, const Tensor& dy_any, const OptionalTensor& y_any, const OptionalTensor& c_any,
                                            const Tensor& x_any, const OptionalTensor& bn_any, int64_t act, const Tensor& weight_any,
                                            int64_t stride, int64_t dilation, int64_t upsample, double count, int64_t variant) {
  const Problem p = problem_of(x_any, weight_any, act, stride, dilation, upsample, variant);
  const c10::cuda::CUDAGuard device(x_any.device());
  TORCH_CHECK(y_any.has_value() == c_any.has_value(), kOp, ": expected both y and c, or neither");
  const Tensor x = image_like("x", x_any, x_any, x_any.sizes()), weight = weight_any.contiguous();
  const std::vector<int64_t> sizes{p.n, p.c, p.out_h, p.out_w};
  const Tensor dy = image_like("dy", dy_any, x, sizes);
  const OptionalTensor y = y_any ? OptionalTensor(image_like("y", *y_any, x, sizes)) : OptionalTensor();
  const OptionalTensor c = floats("c", c_any, x, {3, p.c}), bn = floats("coefficients", bn_any, x, {bn_act::kCoefficients, p.c});
  const auto floating = x.options().dtype(at::kFloat);
  const int64_t rows = bn ? bn_act::kGradients : 0;
  const Tensor du = empty_image(x, x.sizes());
  if (x.numel() == 0) return {du, at::zeros(weight.sizes(), weight.options()), at::zeros({rows, p.c}, floating)};
  const Tensor dweight = at::empty(weight.sizes(), weight.options()), table = at::empty({rows, p.c}, floating);
  run(p,
      Backward{dy.const_data_ptr(), y ? y->const_data_ptr() : nullptr, pointer(c), x.const_data_ptr(), pointer(bn),
               weight.const_data_ptr(), du.data_ptr(), dweight.data_ptr(), bn ? table.data_ptr<float>() : nullptr,
               count > 0.0 ? 1.0 / count : 0.0, nullptr, nullptr},
      x, tickets);
  return {du, dweight, table};
}

}  // namespace
}  // namespace nvae::depthwise_conv::cuda

void nvae::depthwise_conv::register_cuda(torch::Library& m) {
  m.impl("depthwise_conv_cuda_fwd_counted", TORCH_FN(cuda::forward));
  m.impl("depthwise_conv_cuda_bwd_counted", TORCH_FN(cuda::backward));
}
