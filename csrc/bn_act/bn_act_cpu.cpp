// bn_act on the CPU: channels-last inside, float or bfloat16 storage, float arithmetic, sums joined in double.
#include "bn_act/bn_act_cpu.h"

#include <ATen/Dispatch_v2.h>

#include <algorithm>
#include <cmath>

#include "bn_act/followed.h"
#include "common/cpu_op.h"
#include "cpu/kernels.h"

namespace nvae::bn_act {
namespace {

constexpr const char* kOp = "bn_act";

Shape shape_of(const Tensor& x, int64_t act) {
  const int64_t rows = x.size(0) * x.size(2) * x.size(3);
  return {rows, x.size(1), static_cast<int>(act), chunk_rows(rows, 256, 64)};
}
int64_t tasks(const Shape& s) { return s.channels ? (s.rows + s.chunk - 1) / s.chunk : 0; }
int64_t last_rows(const Shape& s) { return s.rows - (tasks(s) - 1) * s.chunk; }

// Undefined where there is none.
struct Others {
  Others(const OptionalTensor& also, const OptionalTensor& also2, const Tensor& x) {
    TORCH_CHECK(also || !also2, kOp, ": also2 without also; pass the only gradient there is as also");
    if (also) first = image_like(kOp, "also", *also, x.sizes(), x.scalar_type());
    if (also2) second = image_like(kOp, "also2", *also2, x.sizes(), x.scalar_type());
  }
  template <typename T>
  Also<T> of() const {
    return {first.defined() ? data<T>(first) : nullptr, second.defined() ? data<T>(second) : nullptr};
  }
  Tensor first, second;
};

}  // namespace

Tensor stats_cpu(const Tensor& x_any) {
  const Tensor x = image(kOp, "x", x_any);
  const Shape s = shape_of(x, 0);
  const auto options = x.options().dtype(at::kFloat);
  if (!tasks(s)) return at::zeros({2, s.channels}, options);
  const Tensor parts = at::empty({tasks(s), 3, s.channels}, options), out = at::empty({2, s.channels}, options);
  float* p = parts.data_ptr<float>();
  by_storage(x, [&](auto* type) {
    const auto run = cpu_kernels().of(type).bn_act.stats;
    const auto* xp = data<std::remove_pointer_t<decltype(type)>>(x);
    for_each_task(tasks(s), 0, x.numel() * 2, [&](int64_t i, float*) { run(s, xp, p + i * 3 * s.channels, i); });
  });
  cpu_kernels().join_stats(p, tasks(s), s.channels, s.chunk, last_rows(s), out.data_ptr<float>());
  return out;
}

Tensor coefficients_cpu(const Tensor& stats_any, const OptionalTensor& weight_any, const OptionalTensor& bias_any, double eps,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& batches,
                        std::optional<double> rate, double count, const OptionalTensor& offset_any) {
  TORCH_CHECK(stats_any.dim() == 2, kOp, ": statistics of shape ", stats_any.sizes(), "; expected [2, C]");
  const int64_t c = stats_any.size(1);
  const Tensor stats = floats(kOp, "statistics", stats_any, {2, c});
  const OptionalTensor weight = floats(kOp, "weight", weight_any, {c}), bias = floats(kOp, "bias", bias_any, {c});
  const OptionalTensor offset = floats(kOp, "offset", offset_any, {c});
  TORCH_CHECK(running_mean.has_value() == running_var.has_value(), kOp, ": expected both running_mean and running_var, or neither");
  TORCH_CHECK(rate || batches || !running_mean, kOp, ": an average over all batches needs their number");
  for (const OptionalTensor* running : {&running_mean, &running_var})
    TORCH_CHECK(!*running || (*running)->sizes() == at::IntArrayRef{c}, kOp, ": running statistics have shape ", (*running)->sizes(),
                "; expected [", c, "]");
  TORCH_CHECK(!batches || batches->numel() == 1, kOp, ": the number of batches has shape ", batches->sizes(), "; expected a scalar");
  const Tensor out = at::empty({kCoefficients, c}, stats.options());
  const float *in = pointer(stats), *w = pointer(weight), *b = pointer(bias), *beside = pointer(offset);
  float* o = out.data_ptr<float>();
  for (int64_t i = 0; i < c; i++) {
    const double mean = in[i], var = in[c + i], rstd = 1.0 / std::sqrt(var + eps), scale = (w ? w[i] : 1.0) * rstd;
    o[kMean * c + i] = in[i];
    o[kVar * c + i] = in[c + i];
    o[kRstd * c + i] = static_cast<float>(rstd);
    o[kScale * c + i] = static_cast<float>(scale);
    o[kShift * c + i] = static_cast<float>((b ? b[i] : 0.0) - mean * scale);
  }
  if (batches) batches->add_(1);
  if (!running_mean || !(count > 0)) return out;  // an empty batch counts and says nothing
  const double part = rate ? *rate : 1.0 / batches->item<double>();
  const auto move = [&](const Tensor& running, const float* found, double factor, const float* added) {
    AT_DISPATCH_V2(running.scalar_type(), "bn_act_coefficients", AT_WRAP([&] {
                     scalar_t* p = running.data_ptr<scalar_t>();
                     const int64_t step = running.stride(0);
                     for (int64_t i = 0; i < c; i++) {
                       const double value = factor * found[i] + (added ? added[i] : 0.0);
                       p[i * step] = static_cast<scalar_t>((1.0 - part) * static_cast<double>(p[i * step]) + part * value);
                     }
                   }),
                   AT_EXPAND(AT_FLOATING_TYPES), at::kBFloat16, at::kHalf);
  };
  move(*running_mean, in, 1.0, beside);
  move(*running_var, in + c, count / std::max(count - 1.0, 1.0), nullptr);
  return out;
}

Tensor followed_cpu(const Tensor& stats, const Tensor& image, at::ArrayRef<double> numbers, const OptionalTensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& offset, const OptionalTensor& running_mean,
                    const OptionalTensor& running_var, const OptionalTensor& batches) {
  if (numbers.empty()) return stats;
  TORCH_CHECK(numbers.size() == 3, kOp, ": expected 3 numbers, eps, momentum and copies, not ", numbers.size());
  const double count = static_cast<double>(image.size(0) * image.size(2) * image.size(3)) * numbers[2];
  return coefficients_cpu(stats, weight, bias, numbers[0], running_mean, running_var, batches, numbers[1], count, offset);
}

void finish_gradients(const float* p, int64_t c, double count, float* o) {
  // fixed statistics: zeros, also where a sum is NaN, which then stays in its element
  const double share = count > 0 ? 1.0 / count : 0.0;
  for (int64_t i = 0; i < c; i++) {
    const double mean = p[kMean * c + i], rstd = p[kRstd * c + i], scale = p[kScale * c + i];
    const double total = o[kTotal * c + i], moment = o[kMoment * c + i] * rstd;
    const double c1 = share > 0 ? -scale * rstd * moment * share : 0.0;
    o[kDweight * c + i] = static_cast<float>(moment);
    o[kC0 * c + i] = p[kScale * c + i];
    o[kC1 * c + i] = static_cast<float>(c1);
    o[kC2 * c + i] = share > 0 ? static_cast<float>(-scale * total * share - c1 * mean) : 0.0f;
    o[kDoffset * c + i] = static_cast<float>((share > 0 ? 0.0 : scale) * total);
  }
}

Tensor gradients_cpu(const Tensor& sums_any, const Tensor& bn_any, double count) {
  TORCH_CHECK(sums_any.dim() == 2, kOp, ": sums of shape ", sums_any.sizes(), "; expected [2, C]");
  const int64_t c = sums_any.size(1);
  const Tensor bn = floats(kOp, "coefficients", bn_any, {kCoefficients, c}), sums = floats(kOp, "sums", sums_any, {2, c});
  const Tensor table = at::empty({kGradients, c}, sums.options());
  float* to = table.data_ptr<float>();
  static_assert(kTotal == 0 && kMoment == 1);
  std::copy_n(pointer(sums), 2 * c, to);
  finish_gradients(pointer(bn), c, count, to);
  return table;
}

Tensor forward_cpu(const Tensor& x_any, const Tensor& bn_any, int64_t act) {
  const Tensor x = image(kOp, "x", x_any), bn = floats(kOp, "coefficients", bn_any, {kCoefficients, x_any.size(1)});
  const Shape s = shape_of(x, act);
  const Tensor y = empty_image(x.size(0), x.size(1), x.size(2), x.size(3), x);
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cpu_kernels().of(type).bn_act.forward;
    for_each_task(tasks(s), 0, x.numel() * 8, [&](int64_t i, float*) { run(s, data<T>(x), pointer(bn), data<T>(y), i); });
  });
  return y;
}

Tensor sums_cpu(const Tensor& dy_any, const Tensor& x_any, const Tensor& bn_any, int64_t act, double count) {
  const Tensor x = image(kOp, "x", x_any), dy = image_like(kOp, "dy", dy_any, x.sizes(), x.scalar_type());
  const Tensor bn = floats(kOp, "coefficients", bn_any, {kCoefficients, x.size(1)});
  const Shape s = shape_of(x, act);
  if (!tasks(s)) return at::zeros({kGradients, s.channels}, bn.options());
  const Tensor parts = at::empty({tasks(s), 2, s.channels}, bn.options()), out = at::empty({kGradients, s.channels}, bn.options());
  float* p = parts.data_ptr<float>();
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cpu_kernels().of(type).bn_act.sums;
    for_each_task(tasks(s), 0, x.numel() * 8, [&](int64_t i, float*) {
      run(s, data<T>(dy), data<T>(x), pointer(bn), p + i * 2 * s.channels, i);
    });
  });
  cpu_kernels().join_sums(p, tasks(s), 2 * s.channels, 0, 2 * s.channels, out.data_ptr<float>());
  finish_gradients(pointer(bn), s.channels, count, out.data_ptr<float>());
  return out;
}

Tensor backward_cpu(const Tensor& dy_any, const Tensor& x_any, const Tensor& bn_any, int64_t act, const Tensor& c_any,
                    const OptionalTensor& also, const OptionalTensor& also2) {
  const Tensor x = image(kOp, "x", x_any), dy = image_like(kOp, "dy", dy_any, x.sizes(), x.scalar_type());
  const Tensor bn = floats(kOp, "coefficients", bn_any, {kCoefficients, x.size(1)}), c = floats(kOp, "c", c_any, {3, x.size(1)});
  const Others others(also, also2, x);
  const Shape s = shape_of(x, act);
  const Tensor dx = empty_image(x.size(0), x.size(1), x.size(2), x.size(3), x);
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cpu_kernels().of(type).bn_act.backward;
    for_each_task(tasks(s), 0, x.numel() * 8, [&](int64_t i, float*) {
      run(s, data<T>(dy), data<T>(x), pointer(bn), pointer(c), others.of<T>(), data<T>(dx), i);
    });
  });
  return dx;
}

void affine_cpu_(Tensor& du, const Tensor& x_any, const Tensor& c_any, const OptionalTensor& also, const OptionalTensor& also2) {
  const Tensor x = image(kOp, "x", x_any), c = floats(kOp, "c", c_any, {3, x.size(1)});
  const Shape s = shape_of(x, 0);
  const Tensor dense = image_like(kOp, "du", du, x.sizes(), x.scalar_type());
  const Others others(also, also2, x);
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cpu_kernels().of(type).bn_act.affine;
    for_each_task(tasks(s), 0, x.numel(), [&](int64_t i, float*) {
      run(s, data<T>(x), pointer(c), others.of<T>(), data<T>(dense), i);
    });
  });
  if (!dense.is_same(du)) du.copy_(dense);
}

}  // namespace nvae::bn_act
