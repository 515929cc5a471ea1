// se_residual on the CPU: channels-last inside, float or bfloat16 storage, float arithmetic, one image a task; what all images
// add to (the gate's weights, the normalisation) is summed in their order, in double.
#include "se_residual/se_residual_cpu.h"

#include "bn_act/bn_act.h"
#include "bn_act/bn_act_cpu.h"
#include "common/cpu_op.h"
#include "cpu/kernels.h"

namespace nvae::se_residual {
namespace {

constexpr const char* kOp = "se_residual";

Shape shape_of(const Tensor& x, const OptionalTensor& w1, double residual_scale) {
  return {x.size(0), x.size(2) * x.size(3), x.size(1), w1 ? w1->size(0) : 0, static_cast<float>(residual_scale)};
}

// `bn` is a normalisation [kCoefficients][channels], or a bias [channels], or absent.
bool is_bias(const OptionalTensor& bn) { return bn && bn->dim() == 1; }
OptionalTensor checked_bn(const OptionalTensor& bn, int64_t channels) {
  return is_bias(bn) ? floats(kOp, "bias", bn, {channels}) : floats(kOp, "coefficients", bn, {bn_act::kCoefficients, channels});
}
Affine affine_of(const OptionalTensor& bn, int64_t channels) {
  const float* p = pointer(bn);
  if (!p || is_bias(bn)) return {nullptr, nullptr, p};
  return {p + bn_act::kMean * channels, p + bn_act::kScale * channels, p + bn_act::kShift * channels};
}

// What the forward leaves for the backward, [images][3 channels + hidden]: mean of x, gate, slope, squeezed. The slope would lose
// the digits of 1 - gate if it were computed from a gate that is rounded.
int64_t state_width(const Shape& s) { return s.hidden ? 3 * s.channels + s.hidden : 0; }
Image image_state(const Shape& s, float* state, int64_t image) {
  float* p = state + image * state_width(s);
  return {p, p + s.channels, p + 2 * s.channels, p + 3 * s.channels};
}

// From dgate [channels], the gradient of the gate, to dpooled, that of what it was computed from; the weights' are added to g.
struct GateGradients {
  std::vector<double> w1, b1, w2, b2;  // w2 as [hidden][channels]
};
void excite_back(const Shape& s, const float* w1, const float* w2, const Image& image, const double* pooled, double* dgate,
                 double* dpooled, GateGradients& g) {
  for (int64_t c = 0; c < s.channels; c++) {
    dgate[c] *= image.slope[c];
    g.b2[c] += dgate[c];
    dpooled[c] = 0;
  }
  for (int64_t h = 0; h < s.hidden; h++) {
    const double squeezed = image.squeezed[h];
    const float* row = w2 + h * s.channels;
    double d = 0;
    for (int64_t c = 0; c < s.channels; c++) {
      g.w2[h * s.channels + c] += dgate[c] * squeezed;
      d += dgate[c] * row[c];
    }
    if (squeezed <= 0) continue;
    g.b1[h] += d;
    for (int64_t c = 0; c < s.channels; c++) {
      g.w1[h * s.channels + c] += d * pooled[c];
      dpooled[c] += d * w1[h * s.channels + c];
    }
  }
}

Tensor as_tensor(const std::vector<double>& values, at::IntArrayRef sizes, const Tensor& like) {
  const Tensor out = at::empty(sizes, like.options().dtype(at::kFloat));
  float* p = out.data_ptr<float>();
  for (size_t i = 0; i < values.size(); i++) p[i] = static_cast<float>(values[i]);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& skip_any, const Tensor& x_any, const OptionalTensor& bn_any,
                                               const OptionalTensor& w1_any, const OptionalTensor& b1_any,
                                               const OptionalTensor& w2_any, const OptionalTensor& b2_any,
                                               const OptionalTensor& means_any, double residual_scale, bool stats) {
  const Tensor x = image(kOp, "x", x_any), skip = image_like(kOp, "skip", skip_any, x.sizes(), x.scalar_type());
  const Shape s = shape_of(x, w1_any, residual_scale);
  const OptionalTensor bn = checked_bn(bn_any, s.channels);
  const OptionalTensor means = floats(kOp, "x_means", means_any, {s.images, s.channels});
  const OptionalTensor w1 = floats(kOp, "w1", w1_any, {s.hidden, s.channels}), b1 = floats(kOp, "b1", b1_any, {s.hidden});
  const OptionalTensor w2 = w2_any ? floats(kOp, "w2", OptionalTensor(w2_any->t()), {s.hidden, s.channels}) : OptionalTensor();
  const OptionalTensor b2 = floats(kOp, "b2", b2_any, {s.channels});
  TORCH_CHECK(!s.hidden || (b1 && w2 && b2), kOp, ": expected all of w1, b1, w2, b2, or none of them");
  const Tensor y = empty_image(s.images, s.channels, x.size(2), x.size(3), x);
  const auto options = x.options().dtype(at::kFloat);
  const Tensor state = at::empty({s.images, state_width(s)}, options), parts = at::empty({stats ? s.images : 0, 3, s.channels}, options);
  const Affine affine = affine_of(bn, s.channels);
  const Gate gate{pointer(w1), pointer(b1), pointer(w2), pointer(b2)};
  float *st = state.data_ptr<float>(), *pt = parts.data_ptr<float>();
  const int64_t tasks = s.pixels ? s.images : 0;
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = cpu_kernels().of(type).se_residual.forward;
    for_each_task(tasks, 0, x.numel() * 4, [&](int64_t i, float*) {
      run(s, gate, data<T>(skip), data<T>(x), affine, means ? pointer(means) + i * s.channels : nullptr, image_state(s, st, i),
          data<T>(y), stats ? pt + i * 3 * s.channels : nullptr, i);
    });
  });
  const Tensor joined = at::zeros({stats ? 2 : 0, s.channels}, options);
  if (stats && tasks) cpu_kernels().join_stats(pt, tasks, s.channels, s.pixels, s.pixels, joined.data_ptr<float>());
  return {y, state, joined};
}

std::vector<Tensor> backward_cpu(const Tensor& dy_any, const Tensor& x_any, const OptionalTensor& bn_any, const OptionalTensor& w1_any,
                                 const OptionalTensor& w2_any, const Tensor& state_any, double residual_scale) {
  const Tensor x = image(kOp, "x", x_any), dy = image_like(kOp, "dy", dy_any, x.sizes(), x.scalar_type());
  const Shape s = shape_of(x, w1_any, residual_scale);
  const OptionalTensor bn = checked_bn(bn_any, s.channels);
  const OptionalTensor w1 = floats(kOp, "w1", w1_any, {s.hidden, s.channels});
  const OptionalTensor w2 = w2_any ? floats(kOp, "w2", OptionalTensor(w2_any->t()), {s.hidden, s.channels}) : OptionalTensor();
  const Tensor state = floats(kOp, "state", state_any, {s.images, state_width(s)});
  const Tensor dx = empty_image(s.images, s.channels, x.size(2), x.size(3), x);
  const Tensor sums = at::empty({s.images, 2, s.channels}, state.options()), ab = at::empty({s.images, 2, s.channels}, state.options());
  const int64_t tasks = s.pixels ? s.images : 0, n = s.channels;
  GateGradients g{std::vector<double>(s.hidden * n), std::vector<double>(s.hidden), std::vector<double>(s.hidden * n),
                  std::vector<double>(s.hidden ? n : 0)};
  std::vector<double> dscale(n), dshift(n), dgate(n), dpooled(n), pooled(n);
  const Affine affine = affine_of(bn, n);
  const float* sp = pointer(sums);
  float *ab_p = ab.data_ptr<float>(), *st = const_cast<float*>(pointer(state));
  const bool wants_sums = s.hidden || bn;
  by_storage(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto& kernels = cpu_kernels().of(type).se_residual;
    if (wants_sums)
      for_each_task(tasks, 0, x.numel() * 4, [&](int64_t i, float*) {
        kernels.sums(s, data<T>(dy), data<T>(x), affine, sums.data_ptr<float>() + i * 2 * n, i);
      });
    // v = scale (x - mean) + bias; the sums are those of dy and of dy (x - mean)
    const auto mean = [&](int64_t c) { return affine.mean ? static_cast<double>(affine.mean[c]) : 0.0; };
    const auto scale = [&](int64_t c) { return affine.scale ? static_cast<double>(affine.scale[c]) : 1.0; };
    const auto shift = [&](int64_t c) { return affine.shift ? static_cast<double>(affine.shift[c]) : 0.0; };
    for (int64_t i = 0; i < tasks; i++) {
      const Image image = image_state(s, st, i);
      const float *s1 = sp + i * 2 * n, *s2 = s1 + n;
      if (s.hidden) {
        for (int64_t c = 0; c < n; c++) {
          pooled[c] = scale(c) * image.x_mean[c] + shift(c);
          dgate[c] = residual_scale * (scale(c) * s2[c] + (shift(c) + mean(c) * scale(c)) * s1[c]);
        }
        excite_back(s, pointer(w1), pointer(w2), image, pooled.data(), dgate.data(), dpooled.data(), g);
      }
      for (int64_t c = 0; c < n; c++) {
        const double gate = residual_scale * (s.hidden ? image.gate[c] : 1.0), dmean = s.hidden ? dpooled[c] : 0.0;
        ab_p[i * 2 * n + c] = static_cast<float>(gate * scale(c));
        ab_p[i * 2 * n + n + c] = static_cast<float>(dmean * scale(c) / s.pixels);
        if (!bn) continue;
        dscale[c] += gate * s2[c];
        if (s.hidden) dscale[c] += dmean * (image.x_mean[c] - mean(c));
        dshift[c] += gate * s1[c] + dmean;
      }
    }
    for_each_task(tasks, 0, x.numel() * 4, [&](int64_t i, float*) {
      kernels.backward(s, data<T>(dy), ab_p + i * 2 * n, ab_p + i * 2 * n + n, data<T>(dx), i);
    });
  });
  std::vector<Tensor> out{dx};
  if (is_bias(bn)) out.push_back(as_tensor(dshift, {n}, x));
  if (bn && !is_bias(bn)) {
    std::vector<float> table(bn_act::kGradients * n);
    std::copy(dshift.begin(), dshift.end(), table.begin() + bn_act::kTotal * n);
    std::copy(dscale.begin(), dscale.end(), table.begin() + bn_act::kMoment * n);
    bn_act::finish_gradients(pointer(bn), n, static_cast<double>(s.images * s.pixels), table.data());
    const Tensor rows = at::empty({bn_act::kCoefficients, n}, x.options().dtype(at::kFloat));
    float* to = rows.data_ptr<float>();
    for (const int row : {bn_act::kDweight, bn_act::kC1, bn_act::kC2, bn_act::kMoment, bn_act::kTotal})  // ops.ApplyNorm
      to = std::copy_n(table.begin() + row * n, n, to);
    out.push_back(rows);
  }
  if (s.hidden) {
    out.push_back(as_tensor(g.w1, {s.hidden, n}, x));
    out.push_back(as_tensor(g.b1, {s.hidden}, x));
    out.push_back(as_tensor(g.w2, {s.hidden, n}, x).t().contiguous());
    out.push_back(as_tensor(g.b2, {n}, x));
  }
  return out;
}

}  // namespace nvae::se_residual
