// depthwise_conv on the CPU: channels-last inside, float or bfloat16 storage, float arithmetic. A task is one image and one block
// of channels, its sums are taken in a fixed order: the same bits for any number of threads.
#include "depthwise_conv/depthwise_conv_cpu.h"

#include "bn_act/bn_act.h"
#include "bn_act/bn_act_cpu.h"
#include "common/cpu_op.h"
#include "cpu/kernels.h"

namespace nvae::depthwise_conv {
namespace {

constexpr const char* kOp = "depthwise_conv";

Shape shape_of(const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation, int64_t up, int64_t act) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 && weight.size(2) == weight.size(3) &&
                  weight.size(2) % 2 == 1 && weight.size(2) <= kMaxKernel,
              kOp, ": weight has shape ", weight.sizes(), "; expected [", x.size(1), ", 1, k, k] with k odd and at most ", kMaxKernel);
  check_storage(kOp, "weight", weight);
  TORCH_CHECK((stride == 1 || stride == 2) && dilation >= 1 && (up == 1 || (up == 2 && stride == 1)), kOp, ": stride ", stride,
              ", dilation ", dilation, ", upsample ", up, "; expected stride 1 or 2, a positive dilation, and stride 1 to upsample by 2");
  const int64_t h = x.size(2) * up, w = x.size(3) * up;
  // Further apart than the image, all taps but the middle one lie outside: the scratch need not grow beyond.
  dilation = std::min(dilation, std::max<int64_t>({h, w, 1}));
  const auto out = [&](int64_t side) { return static_cast<int>(side ? (side - 1) / stride + 1 : 0); };
  return {x.size(0), x.size(1), static_cast<int>(h), static_cast<int>(w), out(h), out(w), static_cast<int>(weight.size(2)),
          static_cast<int>(stride), static_cast<int>(dilation), static_cast<int>(up), static_cast<int>(act)};
}

// [C, 1, k, k] as the kernels read it: [taps_wide^2][C] floats.
Tensor taps_first(const Tensor& weight, const Shape& s) {
  const Tensor w = weight.to(at::kFloat).contiguous();
  const int64_t k = s.kernel, wide = taps_wide(s);
  const Tensor out = at::zeros({wide * wide, s.c}, w.options());
  const float* from = pointer(w);
  float* to = out.data_ptr<float>();
  for (int64_t a = 0; a < s.up; a++)
    for (int64_t b = 0; b < s.up; b++)
      for (int64_t i = 0; i < k * k; i++) {
        float* row = to + ((i / k + a) * wide + i % k + b) * s.c;
        for (int64_t c = 0; c < s.c; c++) row[c] += from[c * k * k + i];
      }
  return out;
}

// The gradient of a weight [C, 1, k, k] from that of its taps_first.
Tensor taps_last(const Tensor& dtaps, const Tensor& weight, const Shape& s) {
  const int64_t k = s.kernel, wide = taps_wide(s);
  const Tensor out = at::zeros({s.c, k * k}, dtaps.options());
  const float* from = pointer(dtaps);
  float* to = out.data_ptr<float>();
  for (int64_t a = 0; a < s.up; a++)
    for (int64_t b = 0; b < s.up; b++)
      for (int64_t i = 0; i < k * k; i++) {
        const float* row = from + ((i / k + a) * wide + i % k + b) * s.c;
        for (int64_t c = 0; c < s.c; c++) to[c * k * k + i] += row[c];
      }
  return out.reshape(weight.sizes()).to(weight.scalar_type());
}

// Dilated, the doubled pixels do not lie under neighbouring taps: what nobody uses is convolved on the doubled image.
bool doubles(int64_t upsample, int64_t dilation) { return upsample == 2 && dilation > 1; }
Tensor doubled(const Tensor& x) { return x.repeat_interleave(2, 2).repeat_interleave(2, 3); }

int64_t tasks(const Shape& s) {
  const int64_t lanes = cpu_kernels().lanes;
  return s.out_h > 0 && s.out_w > 0 ? s.n * ((s.c + lanes - 1) / lanes) : 0;
}
int64_t work(const Shape& s) { return s.n * s.c * s.h * s.w * s.kernel * s.kernel; }

// du takes the memory of dy (dense, stride 1) with `in_place`.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_any, const OptionalTensor& y_any, const OptionalTensor& c_any,
                                            const Tensor& x_any, const OptionalTensor& bn_any, int64_t act, const Tensor& weight,
                                            int64_t stride, int64_t dilation, int64_t upsample, double values, bool in_place) {
  const Tensor x = image(kOp, "x", x_any);
  const Shape s = shape_of(x, weight, stride, dilation, upsample, act);
  if (doubles(upsample, dilation)) {  // in float: four gradients are added
    const auto wide = [](const OptionalTensor& t) { return t ? OptionalTensor(t->to(at::kFloat)) : t; };
    const auto [du, dweight, table] = backward(dy_any.to(at::kFloat), wide(y_any), c_any, doubled(x.to(at::kFloat)), bn_any, act, weight,
                                               stride, dilation, 1, values, false);
    const Tensor joined = du.reshape({s.n, s.c, s.h / 2, 2, s.w / 2, 2}).sum(at::IntArrayRef{3, 5}).to(x.scalar_type());
    if (!bn_any) return {image(kOp, "du", joined), dweight, table};
    const Tensor d = joined.to(at::kDouble), mean = bn_any->select(0, bn_act::kMean).reshape({1, s.c, 1, 1});
    const std::vector<int64_t> pixels{0, 2, 3};
    const Tensor sums = at::empty({2, s.c}, mean.options());  // of four times as many terms they would round more
    sums.select(0, 0).copy_(d.sum(pixels));
    sums.select(0, 1).copy_(x.to(at::kDouble).sub(mean).mul(d).sum(pixels));
    return {image(kOp, "du", joined), dweight, bn_act::gradients_cpu(sums, *bn_any, values)};
  }
  const Tensor taps = taps_first(weight, s);
  const std::vector<int64_t> sizes{s.n, s.c, s.out_h, s.out_w};
  const Tensor dy = image_like(kOp, "dy", dy_any, sizes, x.scalar_type());
  TORCH_CHECK(y_any.has_value() == c_any.has_value(), kOp, ": expected both y and c, or neither");
  const OptionalTensor y = y_any ? OptionalTensor(image_like(kOp, "y", *y_any, sizes, x.scalar_type())) : OptionalTensor();
  const OptionalTensor c = floats(kOp, "c", c_any, {3, s.c}), bn = floats(kOp, "coefficients", bn_any, {bn_act::kCoefficients, s.c});
  const int64_t size = taps.numel();
  const Tensor du = in_place ? dy : empty_image(s.n, s.c, x.size(2), x.size(3), x);
  const Tensor parts = at::empty({s.n, size}, taps.options()), sum_parts = at::empty({bn ? s.n : 0, 2 * s.c}, taps.options());
  const Tensor dtaps = at::zeros(taps.sizes(), taps.options()), table = at::zeros({bn ? bn_act::kGradients : 0, s.c}, taps.options());
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Backward<T> f{data<T>(dy), y ? data<T>(*y) : nullptr, data<T>(x), pointer(c), pointer(bn), pointer(taps), data<T>(du),
                        bn ? sum_parts.data_ptr<float>() : nullptr, parts.data_ptr<float>()};
    const auto run = cpu_kernels().of(type).depthwise_conv.backward;
    for_each_task(tasks(s), scratch_floats(s), 2 * work(s), [&](int64_t i, float* scratch) { run(s, f, i, scratch); });
  });
  if (tasks(s)) {
    cpu_kernels().join_sums(pointer(parts), s.n, size, 0, size, dtaps.data_ptr<float>());
    if (bn) {
      cpu_kernels().join_sums(pointer(sum_parts), s.n, 2 * s.c, 0, 2 * s.c, table.data_ptr<float>());
      bn_act::finish_gradients(pointer(bn), s.c, values, table.data_ptr<float>());
    }
  }
  return {du, taps_last(dtaps, weight, s), table};
}
}  // namespace

std::tuple<Tensor, Tensor> forward_cpu(const Tensor& x_any, const OptionalTensor& bn_any, int64_t act, const Tensor& weight,
                                       int64_t stride, int64_t dilation, int64_t upsample, bool stats) {
  const Tensor x = image(kOp, "x", x_any);
  const Shape s = shape_of(x, weight, stride, dilation, upsample, act);
  if (doubles(upsample, dilation)) return forward_cpu(doubled(x), bn_any, act, weight, stride, dilation, 1, stats);
  const Tensor taps = taps_first(weight, s);
  const OptionalTensor bn = floats(kOp, "coefficients", bn_any, {bn_act::kCoefficients, s.c});
  const Tensor y = empty_image(s.n, s.c, s.out_h, s.out_w, x), parts = at::empty({stats ? s.n : 0, 3, s.c}, taps.options());
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<T> f{data<T>(x), pointer(bn), pointer(taps), data<T>(y), stats ? parts.data_ptr<float>() : nullptr};
    const auto run = cpu_kernels().of(type).depthwise_conv.forward;
    for_each_task(tasks(s), scratch_floats(s), work(s), [&](int64_t i, float* scratch) { run(s, f, i, scratch); });
  });
  const Tensor joined = at::zeros({stats ? 2 : 0, s.c}, taps.options());
  const double pixels = static_cast<double>(s.out_h) * s.out_w;
  if (stats && tasks(s)) cpu_kernels().join_stats(pointer(parts), s.n, s.c, pixels, pixels, joined.data_ptr<float>());
  return {y, joined};
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& dy, const OptionalTensor& y, const OptionalTensor& c, const Tensor& x,
                                                const OptionalTensor& bn, int64_t act, const Tensor& weight, int64_t stride,
                                                int64_t dilation, int64_t upsample, double values) {
  return backward(dy, y, c, x, bn, act, weight, stride, dilation, upsample, values, false);
}

std::tuple<Tensor, Tensor> backward_cpu_(Tensor& dy, const OptionalTensor& y, const OptionalTensor& c, const Tensor& x,
                                         const OptionalTensor& bn, int64_t act, const Tensor& weight, int64_t dilation,
                                         double values) {
  const bool dense = dy.is_contiguous(at::MemoryFormat::ChannelsLast);
  auto [du, dweight, table] = backward(dy, y, c, x, bn, act, weight, 1, dilation, 1, values, dense);
  if (!du.is_same(dy)) dy.copy_(du);
  return {dweight, table};
}

}  // namespace nvae::depthwise_conv
