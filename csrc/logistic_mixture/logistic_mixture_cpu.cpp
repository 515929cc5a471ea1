// logistic_mixture_log_prob on the CPU: any strides, params in float or bfloat16, float arithmetic, one pass over params each way.
// A task is a block of pixels, whose place depends on the shape alone: the same bits for any number of threads.
#include "logistic_mixture/logistic_mixture_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/isa.h"
#include "common/math.h"
#include "logistic_mixture/logistic_mixture.h"

namespace nvae::logistic_mixture {
namespace {

#define NVAE_KERNEL "logistic_mixture/logistic_mixture_kernel.h"
#include "common/each_isa.h"

using at::Tensor;

// One tensor [B, C, H, W] (or [B, H, W], C = 1) as a task sees it: pixels [start, start + n) of image b. T is float, or uint16_t for
// the bits of a bfloat16.
template <typename T>
class View {
 public:
  View(const Tensor& t, bool has_channels)
      : data_(reinterpret_cast<T*>(const_cast<void*>(t.const_data_ptr()))),
        channels_(has_channels ? static_cast<int>(t.size(1)) : 1),
        width_(t.size(-1)), stride_b_(t.stride(0)), stride_c_(has_channels ? t.stride(1) : 0),
        stride_h_(t.stride(-2)), stride_w_(t.stride(-1)) {}

  Pixels<T> at(int64_t b, int64_t start, int n, int64_t (&offset)[kBlock]) const {
    int64_t h = start / width_, w = start % width_;
    for (int i = 0; i < n; i++) {
      offset[i] = h * stride_h_ + w * stride_w_;
      if (++w == width_) w = 0, h++;
    }
    bool neighbours = true;
    for (int i = 1; i < n; i++) neighbours &= offset[i] == offset[0] + i;
    return {data_ + b * stride_b_, stride_c_, channels_, n, offset, neighbours};
  }

 private:
  T* data_;
  int channels_;
  int64_t width_, stride_b_, stride_c_, stride_h_, stride_w_;
};

template <typename T>
constexpr bool in_place(const Pixels<T>& p) {
  return sizeof(T) == sizeof(float) && p.neighbours;
}

// Rows to read: in place where the pixels are contiguous floats, else copied to `scratch`.
template <typename T>
Rows load(const Pixels<T>& p, float* scratch) {
  if (in_place(p)) return {(float*)(p.data + p.offset[0]), p.stride_c};
  const Rows rows{scratch, kBlock};
  NVAE_SELECT(gather<T>)(Pixels<const T>{p.data, p.stride_c, p.channels, p.n, p.offset, p.neighbours}, rows);
  return rows;
}

struct Problem {
  Settings settings;
  int64_t params_channels, images, area;

  int64_t blocks() const { return (area + kBlock - 1) / kBlock; }
};

// f(b, start, n, scratch) for every block, in parallel. The scratch holds that of the kernels, then `rows` rows more.
template <typename F>
void for_each_block(const Problem& p, int64_t rows, const F& f) {
  const int64_t work = kBlock * p.settings.channels * p.settings.mixtures, total = scratch_rows(p.settings) + rows;
  at::parallel_for(0, p.images * p.blocks(), std::max<int64_t>(1, 4096 / work), [&](int64_t begin, int64_t end) {
    std::vector<float> memory(total * kBlock + 16);
    float* scratch = memory.data();
    while (reinterpret_cast<uintptr_t>(scratch) % 64) scratch++;
    for (int64_t task = begin; task < end; task++) {
      const int64_t start = task % p.blocks() * kBlock;
      f(task / p.blocks(), start, static_cast<int>(std::min<int64_t>(kBlock, p.area - start)), scratch);
    }
  });
}

template <typename T>
void forward(const Problem& p, const Tensor& x, const Tensor& params, Tensor& out) {
  const auto run = NVAE_SELECT(forward_block);
  const View<float> x_view(x, true);
  const View<T> params_view(params, true);
  float* result = out.data_ptr<float>();
  for_each_block(p, p.settings.channels + p.params_channels, [&](int64_t b, int64_t start, int n, float* scratch) {
    int64_t x_offset[kBlock], offset[kBlock];
    float* spare = scratch + scratch_rows(p.settings) * kBlock;
    const Rows x_rows = load(x_view.at(b, start, n, x_offset), spare);
    const Rows rows = load(params_view.at(b, start, n, offset), spare + p.settings.channels * kBlock);
    run({p.settings, x_rows, rows, n, scratch}, result + b * p.area + start);
  });
}

template <typename T>
void backward(const Problem& p, const Tensor& grad, const Tensor& x, const Tensor& params, Tensor& out) {
  const auto run = NVAE_SELECT(backward_block);
  const View<float> grad_view(grad, false), x_view(x, true);
  const View<T> params_view(params, true), out_view(out, true);
  const int64_t channels = p.settings.channels;
  for_each_block(p, 1 + channels + 2 * p.params_channels, [&](int64_t b, int64_t start, int n, float* scratch) {
    int64_t offset[kBlock], params_offset[kBlock], out_offset[kBlock];
    float* spare = scratch + scratch_rows(p.settings) * kBlock;
    const auto next = [&](int64_t rows) {
      float* mine = spare;
      spare += rows * kBlock;
      return mine;
    };
    const Rows grad_rows = load(grad_view.at(b, start, n, offset), next(1));
    const Rows x_rows = load(x_view.at(b, start, n, offset), next(channels));
    const Rows rows = load(params_view.at(b, start, n, params_offset), next(p.params_channels));
    const Pixels<T> target = out_view.at(b, start, n, out_offset);
    const Rows out_rows = in_place(target) ? Rows{(float*)(target.data + out_offset[0]), target.stride_c}
                                           : Rows{next(p.params_channels), kBlock};
    run({p.settings, x_rows, rows, n, scratch}, grad_rows.data, out_rows);
    if (!in_place(target)) NVAE_SELECT(scatter<T>)(out_rows, target);
  });
}

Problem check(const Tensor& x, const Tensor& params, int64_t mixtures, int64_t bits, bool fixed) {
  TORCH_CHECK(x.dim() == 4 && params.dim() == 4 && x.device().is_cpu() && params.device().is_cpu() && x.size(0) == params.size(0) &&
                  x.size(2) == params.size(2) && x.size(3) == params.size(3),
              "logistic_mixture_log_prob takes x [B, C, H, W] and params [B, channels, H, W] on the CPU, not ", x.sizes(), " and ",
              params.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat && (params.scalar_type() == at::kFloat || params.scalar_type() == at::kBFloat16),
              "logistic_mixture_log_prob takes x in float32 and params in float32 or bfloat16, not ", x.scalar_type(), " and ",
              params.scalar_type());
  const int64_t c = x.size(1), expected = mixtures * (1 + 2 * c + c * (c - 1) / 2);
  TORCH_CHECK(c >= 1 && mixtures >= 1 && params.size(1) == expected, "logistic_mixture_log_prob: params has ", params.size(1),
              " channels, expected ", expected, " for ", c, " channels of x and ", mixtures, " mixtures");
  TORCH_CHECK(bits >= 1 && bits <= 8, "logistic_mixture_log_prob takes 1 to 8 bits, not ", bits);
  const double top_level = static_cast<double>((1 << bits) - 1);
  const Settings settings{static_cast<int>(c), static_cast<int>(mixtures), static_cast<float>(1.0 / top_level),
                          static_cast<float>(-std::log(top_level / 2.0)), fixed ? 0.999f : 0.99f};
  return {settings, expected, x.size(0), x.size(2) * x.size(3)};
}

void check_gradient(const Tensor& grad, const Tensor& x) {
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({x.size(0), x.size(2), x.size(3)}) && grad.scalar_type() == at::kFloat &&
                  grad.device().is_cpu(),
              "logistic_mixture_log_prob: a gradient of shape ", grad.sizes(), " and type ", grad.scalar_type(),
              " does not fit x of shape ", x.sizes());
}

}  // namespace

Tensor forward_cpu(const Tensor& x, const Tensor& params, int64_t num_mixtures, int64_t num_bits, bool fixed) {
  const Problem p = check(x, params, num_mixtures, num_bits, fixed);
  Tensor out = at::empty({x.size(0), x.size(2), x.size(3)}, x.options());
  if (params.scalar_type() == at::kFloat)
    forward<float>(p, x, params, out);
  else
    forward<uint16_t>(p, x, params, out);
  return out;
}

Tensor backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& params, int64_t num_mixtures, int64_t num_bits, bool fixed) {
  const Problem p = check(x, params, num_mixtures, num_bits, fixed);
  check_gradient(grad, x);
  Tensor out = at::empty_like(params);
  if (params.scalar_type() == at::kFloat)
    backward<float>(p, grad, x, params, out);
  else
    backward<uint16_t>(p, grad, x, params, out);
  return out;
}

}  // namespace nvae::logistic_mixture
