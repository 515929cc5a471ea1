// pointwise_conv on the CPU: channels-last inside, float or bfloat16 storage, float arithmetic. A task is a run of rows whose
// number depends on the sizes alone, and tasks' sums are joined in order: the same bits for any number of threads.
#include "pointwise_conv/pointwise_conv_cpu.h"

#include <ATen/ops/cat.h>

#include <vector>

#include "bn_act/bn_act.h"
#include "bn_act/bn_act_cpu.h"
#include "common/cpu_op.h"
#include "cpu/kernels.h"

namespace nvae::pointwise_conv {
namespace {

constexpr const char* kOp = "pointwise_conv";
constexpr int64_t kParts = 4 << 20;  // floats that the tasks' weight gradients may take together

Shape shape_of(const Tensor& x, const Tensor& weight, int64_t act) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1, kOp,
              ": weight has shape ", weight.sizes(), "; expected [C_out, ", x.size(1), ", 1, 1]");
  check_storage(kOp, "weight", weight);
  const int64_t pixels = x.size(2) * x.size(3);
  return {x.size(0) * pixels, x.size(1), weight.size(0), static_cast<int>(act), pixels, 0};
}
int64_t tasks(const Shape& s) { return s.out ? (s.m + s.chunk - 1) / s.chunk : 0; }

// `rows` x `columns` of w(row, column), strides given, as panels [columns / panel][rows][panel], zeros behind the last column.
Tensor pack(const Tensor& weight, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  const Tensor w = weight.to(at::kFloat).contiguous();
  const int64_t panel = cpu_kernels().panel, panels = (columns + panel - 1) / panel;
  const Tensor out = at::empty({panels, rows, panel}, w.options());
  const float* from = pointer(w);
  float* to = out.data_ptr<float>();
  for_each_task(panels, 0, rows * columns, [&](int64_t j, float*) {
    const int64_t width = std::min(panel, columns - j * panel);
    float* p = to + j * rows * panel;
    for (int64_t r0 = 0; r0 < rows; r0 += 16)  // blocks of one cache line, whichever way w lies
      for (int64_t c = 0; c < panel; c++)
        for (int64_t r = r0; r < std::min(r0 + 16, rows); r++)
          p[r * panel + c] = c < width ? from[r * row_stride + (j * panel + c) * column_stride] : 0.0f;
  });
  return out;
}

// x and what stands beside it as one image.
Tensor joined(const Tensor& x_any, const OptionalTensor& beside) {
  const Tensor x = image(kOp, "x", x_any);
  if (!beside) return x;
  TORCH_CHECK(beside->dim() == 4, kOp, ": beside has shape ", beside->sizes(), "; expected [N, C, H, W]");
  return at::cat({x, image_like(kOp, "beside", *beside, {x.size(0), beside->size(1), x.size(2), x.size(3)}, x.scalar_type())}, 1)
      .contiguous(at::MemoryFormat::ChannelsLast);
}

// Means over each image's pixels from the sums of (image, task), in double.
Tensor join_means(const Shape& s, const Tensor& sums, int64_t images) {
  const Tensor out = at::zeros({images, s.out}, sums.options());
  const float* in = pointer(sums);
  std::vector<double> total(s.out);
  for (int64_t n = 0; n < images; n++) {
    const int64_t first = n * s.pixels / s.chunk, last = ((n + 1) * s.pixels - 1) / s.chunk;
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t task = first; task <= last; task++)
      for (int64_t c = 0; c < s.out; c++) total[c] += in[(n + task) * s.out + c];
    for (int64_t c = 0; c < s.out; c++) out.data_ptr<float>()[n * s.out + c] = static_cast<float>(total[c] / s.pixels);
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& x_any, const OptionalTensor& bn_any, int64_t act, const Tensor& weight,
                                               bool stats, bool means, const OptionalTensor& bias_any,
                                               const OptionalTensor& addend_any, const OptionalTensor& beside) {
  TORCH_CHECK(!bn_any || !beside, kOp, ": expected coefficients, or another input beside x, not both");
  const Tensor x = joined(x_any, beside);
  const OptionalTensor bn = floats(kOp, "coefficients", bn_any, {bn_act::kCoefficients, x.size(1)});
  Shape s = shape_of(x, weight, act);
  s.chunk = chunk_rows(s.m, 64, 64);
  const int64_t images = x.size(0), count = tasks(s);
  const auto options = x.options().dtype(at::kFloat);
  const Tensor y = empty_image(images, s.out, x.size(2), x.size(3), x);
  TORCH_CHECK(!bias_any || (bias_any->dim() == 1 && bias_any->size(0) == s.out && bias_any->device().is_cpu()), kOp,
              ": bias has shape ", bias_any ? bias_any->sizes() : x.sizes(), "; expected [", s.out, "] on the CPU");
  const OptionalTensor bias = bias_any ? OptionalTensor(bias_any->to(at::kFloat).contiguous()) : OptionalTensor();
  const OptionalTensor addend =
      addend_any ? OptionalTensor(image_like(kOp, "addend", *addend_any, y.sizes(), x.scalar_type())) : OptionalTensor();
  const Tensor packed = pack(weight, s.in, s.out, 1, s.in);
  const Tensor parts = at::empty({stats ? count : 0, 3, s.out}, options);
  const Tensor pixel_sums = at::empty({means ? images + count : 0, s.out}, options);
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Forward<T> f{data<T>(x), pointer(bn), pointer(packed), pointer(bias), addend ? data<T>(*addend) : nullptr, data<T>(y),
                       stats ? parts.data_ptr<float>() : nullptr, means ? pixel_sums.data_ptr<float>() : nullptr};
    const auto run = cpu_kernels().of(type).pointwise_conv.forward;
    for_each_task(count, scratch_floats(s), s.m * s.in * s.out, [&](int64_t i, float* scratch) { run(s, f, i, scratch); });
  });
  Tensor joined = stats ? at::zeros({2, s.out}, options) : at::empty({0, s.out}, options);
  if (stats && count)
    cpu_kernels().join_stats(pointer(parts), count, s.out, s.chunk, s.m - (count - 1) * s.chunk, joined.data_ptr<float>());
  return {y, joined, means && s.pixels ? join_means(s, pixel_sums, images) : at::zeros({means ? images : 0, s.out}, options)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(const Tensor& dy_any, const OptionalTensor& y_any,
                                                                const OptionalTensor& c_any, const Tensor& x_any,
                                                                const OptionalTensor& bn_any, int64_t act, const Tensor& weight,
                                                                double values, bool bias, const OptionalTensor& also_any,
                                                                const OptionalTensor& beside) {
  TORCH_CHECK(!bn_any || !beside, kOp, ": expected coefficients, or another input beside x, not both");
  TORCH_CHECK(!bn_any || !also_any, kOp, ": du is no gradient of x: expected no other one to add, or no coefficients");
  const Tensor x = joined(x_any, beside);
  Shape s = shape_of(x, weight, act);
  s.chunk = chunk_rows(s.m, 256, std::clamp<int64_t>(kParts / std::max<int64_t>(1, s.in * s.out), 1, 16));
  const int64_t count = (s.m + s.chunk - 1) / s.chunk, size = s.in * s.out;
  const std::vector<int64_t> sizes{x.size(0), s.out, x.size(2), x.size(3)};
  const Tensor dy = image_like(kOp, "dy", dy_any, sizes, x.scalar_type());
  TORCH_CHECK(y_any.has_value() == c_any.has_value(), kOp, ": expected both y and c, or neither");
  const OptionalTensor y = y_any ? OptionalTensor(image_like(kOp, "y", *y_any, sizes, x.scalar_type())) : OptionalTensor();
  const int64_t c_rows = c_any && c_any->sizes() == at::IntArrayRef{2, s.out} ? 2 : 3;
  const OptionalTensor c = floats(kOp, "c", c_any, {c_rows, s.out});
  const OptionalTensor bn = floats(kOp, "coefficients", bn_any, {bn_act::kCoefficients, s.in});
  const auto options = x.options().dtype(at::kFloat);
  const Tensor du = empty_image(x.size(0), s.in, x.size(2), x.size(3), x), packed = pack(weight, s.out, s.in, s.in, 1);
  const OptionalTensor also =
      also_any ? OptionalTensor(image_like(kOp, "also", *also_any, x_any.sizes(), x.scalar_type())) : OptionalTensor();
  const Tensor bias_parts = at::empty({bias ? count : 0, s.out}, options), dbias = at::zeros({bias ? s.out : 0}, options);
  const Tensor parts = at::empty({count, size}, options), sum_parts = at::empty({bn ? count : 0, 2 * s.in}, options);
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Backward<T> f{data<T>(dy),
                        y ? data<T>(*y) : nullptr,
                        data<T>(x),
                        also && !beside ? data<T>(*also) : nullptr,
                        c && c_rows == 3 ? pointer(c) : nullptr,
                        c ? pointer(c) + (c_rows - 2) * s.out : nullptr,
                        pointer(bn),
                        pointer(packed),
                        data<T>(du),
                        bn ? sum_parts.data_ptr<float>() : nullptr,
                        parts.data_ptr<float>(),
                        bias ? bias_parts.data_ptr<float>() : nullptr};
    const auto run = cpu_kernels().of(type).pointwise_conv.backward;
    for_each_task(count, scratch_floats(s), 2 * s.m * size, [&](int64_t i, float* scratch) { run(s, f, i, scratch); });
  });
  const Tensor dweight = at::empty({s.out, s.in, 1, 1}, options), table = at::zeros({bn ? bn_act::kGradients : 0, x_any.size(1)}, options);
  constexpr int64_t kBlock = 1 << 12;
  float* to = dweight.data_ptr<float>();
  for_each_task((size + kBlock - 1) / kBlock, 0, size * count, [&](int64_t i, float*) {
    cpu_kernels().join_sums(pointer(parts), count, size, i * kBlock, std::min(size, (i + 1) * kBlock), to);
  });
  if (bias) cpu_kernels().join_sums(pointer(bias_parts), count, s.out, 0, s.out, dbias.data_ptr<float>());
  if (bn) {
    cpu_kernels().join_sums(pointer(sum_parts), count, 2 * s.in, 0, 2 * s.in, table.data_ptr<float>());
    bn_act::finish_gradients(pointer(bn), s.in, values, table.data_ptr<float>());
  }
  const auto type = weight.scalar_type();
  if (!beside) return {du, dweight.to(type), table, dbias.to(type), at::empty({0}, x.options())};
  const auto of = [&](int64_t first, int64_t n) { return du.narrow(1, first, n).contiguous(at::MemoryFormat::ChannelsLast); };
  const Tensor dx = of(0, x_any.size(1)), dbeside = of(x_any.size(1), beside->size(1));
  return {also ? dx.add(*also) : dx, dweight.to(type), table, dbias.to(type), dbeside};
}

}  // namespace nvae::pointwise_conv
