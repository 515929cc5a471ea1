// Depthwise convolution, channels last, one task = one image x L channels. A task slides down the image with a ring of rows in
// the first-level cache: every input is loaded, normalised and activated once, every gradient is read once, and the sums that
// the neighbouring BatchNorms need ride along.
#pragma once
#include "bn_act/bn_act.h"
#include "common/activation.h"
#include "common/statistics.h"
#include "depthwise_conv/depthwise_taps.h"

namespace nvae::NVAE_ISA::dw {

using bn_act::kMean;
using bn_act::kScale;
using bn_act::kShift;
using depthwise_conv::Backward;
using depthwise_conv::Forward;
using depthwise_conv::Shape;

constexpr int kMaxTaps = (depthwise_conv::kMaxKernel + 1) * (depthwise_conv::kMaxKernel + 1);

// The channels of a task: n < L in the last block.
struct Place {
  int64_t image, c;
  int n;
};
inline Place place(const Shape& s, int64_t task) {
  const int64_t blocks = (s.c + L - 1) / L, c = task % blocks * L;
  return {task / blocks, c, (int)(s.c - c < L ? s.c - c : L)};
}

// f(load): a loop body written once for whole vectors and once for the last, partial block.
template <typename F>
NVAE_ALWAYS void by_width(int n, const F& f) {
  if (n == L)
    f([](const auto* p) __attribute__((always_inline)) { return load(p); });
  else
    f([n](const auto* p) __attribute__((always_inline)) { return load_n(p, n); });
}

// One row of x in memory.
struct Row {
  int64_t stride;
  int w, n;
  vf scale, shift;
};
inline Row row_of(const Shape& s, const Place& at, const float* bn) {
  Row r{s.c, s.w / s.up, at.n, splat(1.0f), vf{}};
  if (bn) r.scale = load_n(bn + kScale * s.c + at.c, at.n), r.shift = load_n(bn + kShift * s.c + at.c, at.n);
  return r;
}

// row[w] = act(u)
template <int ACT, typename T>
void fill_activated(const Row& r, const T* x, float* row) {
  by_width(r.n, [&](auto get) __attribute__((always_inline)) {
    for (int w = 0; w < r.w; w++) {
      __builtin_prefetch(x + (int64_t)(w + r.w) * r.stride);
      store(row + w * L, activate<ACT>(get(x + w * r.stride) * r.scale + r.shift));
    }
  });
}

// value[w] = act(u), slope[w] = act'(u)
template <int ACT, typename T>
void fill_both(const Row& r, const T* x, float* value, float* slope) {
  by_width(r.n, [&](auto get) __attribute__((always_inline)) {
    for (int w = 0; w < r.w; w++) {
      __builtin_prefetch(x + (int64_t)(w + r.w) * r.stride);
      vf a, d;
      activate_both<ACT>(get(x + w * r.stride) * r.scale + r.shift, a, d);
      store(value + w * L, a);
      store(slope + w * L, d);
    }
  });
}

// The value that a later load of what was stored as T gives.
template <typename T>
NVAE_ALWAYS vf as_stored(vf x) {
  if constexpr (sizeof(T) == 4) return x;
  return widen(narrow(x));
}

// p[i stride] = values[i]
template <int P, typename T>
NVAE_ALWAYS void write(T* p, int64_t stride, const vf* values, int n, bool streaming) {
  if (streaming) {
    NVAE_UNROLL for (int i = 0; i < P; i++) stream(p + i * stride, values[i]);
  } else if (n == L) {
    NVAE_UNROLL for (int i = 0; i < P; i++) store(p + i * stride, values[i]);
  } else {
    NVAE_UNROLL for (int i = 0; i < P; i++) store_n(p + i * stride, values[i], n);
  }
}

// Rows of the ring that k taps of one row see: row `top` under the first, `step` further for each other. Row r of `rows` lies in
// slot r % slots.
inline Taps taps(int k, int stride, int dilation, int rows, int top, int step, const float* ring, int64_t pitch, int slots) {
  Taps t{k, stride, dilation, k, 0, {}};
  for (int kh = 0; kh < k; kh++) {
    const int in = top + kh * step;
    if (in < 0 || in >= rows) continue;
    if (kh < t.k0) t.k0 = kh;
    t.k1 = kh + 1;
    t.rows[kh] = ring + in % slots * pitch;
  }
  return t;
}

// Which taps an output sees along an axis: `count` of them, every `up`-th from `phase` on, the first over pixel `first`.
struct Seen {
  int count, phase, first;
};
inline Seen seen(const Shape& s, int out) {
  const int pad = s.dilation * (s.kernel - 1) / 2;
  if (s.up == 1) return {s.kernel, 0, out * s.stride - pad};
  const int phase = (pad + 1 - out) & 1;
  return {(s.kernel + 1) / 2, phase, (out - pad - 1 + phase) / 2};
}

template <typename T>
void forward(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  const Place at = place(s, task);
  const int count = seen(s, 0).count, reach = s.dilation * (count - 1), slots = reach + 1, left = -seen(s, 0).first;
  const int rows = s.h / s.up, width = taps_wide(s);
  const auto fill = s.act == kSwish ? fill_activated<kSwish, T> : s.act == kElu ? fill_activated<kElu, T> : fill_activated<kIdentity, T>;
  const Row row = row_of(s, at, f.bn);
  const int64_t pitch = (int64_t)(row.w + 2 * left) * L;
  vf wt[kMaxTaps];  // up-sampled, the taps of each phase of rows and columns after one another
  for (int phase = 0, i = 0; phase < s.up * s.up; phase++)
    for (int kh = phase / s.up; kh < width; kh += s.up)
      for (int kw = phase % s.up; kw < width; kw += s.up) wt[i++] = load_n(f.weight + (kh * width + kw) * s.c + at.c, at.n);
  const T* x = f.x + at.image * rows * row.w * s.c + at.c;
  T* y = f.y + at.image * s.out_h * s.out_w * s.c + at.c;
  const bool streaming = at.n == L && may_stream(f.y, s.c, s.n * s.out_h * s.out_w * s.c), stats = f.stats != nullptr;
  float* ring = scratch;
  __builtin_memset(ring, 0, sizeof(float) * pitch * slots);
  vf pivot{}, s1{}, s2{};
  bool first = true;
  int filled = 0;
  for (int ho = 0; ho < s.out_h; ho++) {
    const Seen high = seen(s, ho);
    for (const int bottom = high.first + slots, end = bottom < rows ? bottom : rows; filled < end; filled++)
      fill(row, x + (int64_t)filled * row.w * s.c, ring + filled % slots * pitch + left * L);
    for (int side = 0; side < s.up; side++) {  // columns side, side + up, ...
      const Seen wide = seen(s, side);
      const float* begin = ring + (left + wide.first) * L;
      T* out = y + ((int64_t)ho * s.out_w + side) * s.c;
      convolve_row(taps(count, s.stride, s.dilation, rows, high.first, s.dilation, begin, pitch, slots), s.out_w / s.up,
                   wt + (high.phase * s.up + wide.phase) * count * count,
                   [&](int w, const vf* acc, auto columns) __attribute__((always_inline)) {
                     constexpr int P = decltype(columns)::value;
                     write<P>(out + (int64_t)w * s.up * s.c, s.up * s.c, acc, at.n, streaming);
                     if (!stats) return;
                     if (first) {  // the mean of the first block: one pixel may lie several deviations off
                       NVAE_UNROLL for (int i = 0; i < P; i++) pivot += as_stored<T>(acc[i]);
                       pivot *= 1.0f / P;
                       first = false;
                     }
                     vf d1{}, d2{};
                     NVAE_UNROLL for (int i = 0; i < P; i++) {
                       const vf e = as_stored<T>(acc[i]) - pivot;
                       d1 += e;
                       d2 += e * e;
                     }
                     s1 += d1;
                     s2 += d2;
                   });
    }
    if (stats && !(ho & (ho + 1))) centre(pivot, s1, s2, (float)((ho + 1) * s.out_w));  // after 1, 2, 4, ... rows
  }
  if (stats) {
    float* o = f.stats + at.image * 3 * s.c + at.c;
    store_n(o, pivot, at.n);
    store_n(o + s.c, s1, at.n);
    store_n(o + 2 * s.c, s2, at.n);
  }
  stream_fence();
}

// p[w stride] = c0 dy + c1 y + c2, or dy
template <typename T>
void fill_gradient(const Shape& s, const Backward<T>& f, const Place& at, int64_t offset, const vf* c, float* p) {
  by_width(at.n, [&](auto get) __attribute__((always_inline)) {
    for (int w = 0; w < s.out_w; w++) {
      const int64_t i = offset + w * s.c, next = i + s.out_w * s.c;
      __builtin_prefetch(f.dy + next);
      vf g = get(f.dy + i);
      if (f.c) {
        __builtin_prefetch(f.y + next);
        g = g * c[0] + get(f.y + i) * c[1] + c[2];
      }
      store(p + (int64_t)w * s.stride * L, g);
    }
  });
}

// With a stride, g stands at every stride-th pixel of a map of the image's size, zeros between: a stride-1 backward then. With `up`,
// a pixel of x sees kernel + 1 rows and columns of g.
template <typename T>
void backward(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  const Place at = place(s, task);
  const int kernel = taps_wide(s), count = kernel * kernel, reach = s.dilation * (s.kernel - 1), pad = reach / 2, slots = reach + s.up;
  const int64_t pitch = (int64_t)(s.w + reach) * L, width = (int64_t)s.w * L;
  const auto fill = s.act == kSwish ? fill_both<kSwish, T> : s.act == kElu ? fill_both<kElu, T> : fill_both<kIdentity, T>;
  vf wt[kMaxTaps], dw[kMaxTaps], total[kMaxTaps];  // dw is added to total every few rows: shorter sums round less
  for (int k = 0; k < count; k++) wt[k] = load_n(f.weight + k * s.c + at.c, at.n), dw[k] = total[k] = vf{};
  const Row row = row_of(s, at, f.bn);
  const vf mean = f.bn ? load_n(f.bn + kMean * s.c + at.c, at.n) : vf{};
  vf c[3] = {};
  if (f.c)
    for (int i = 0; i < 3; i++) c[i] = load_n(f.c + i * s.c + at.c, at.n);
  const int rows = s.h / s.up;
  const int64_t out = at.image * s.out_h * s.out_w * s.c + at.c, in = at.image * rows * row.w * s.c + at.c;
  const bool streaming = at.n == L && may_stream(f.du, s.c, s.n * rows * row.w * s.c), sums = f.sums != nullptr;
  float *ring = scratch, *act = ring + pitch * slots, *slope = act + width;
  __builtin_memset(ring, 0, sizeof(float) * pitch * slots);
  vf s1{}, s2{};
  int filled = 0;
  for (int h = 0; h < rows; h++) {
    const int last = h * s.up + pad + s.up - 1;  // row of g that the first taps see
    for (const int end = last < s.h ? last + 1 : s.h; filled < end; filled++) {
      float* p = ring + filled % slots * pitch + pad * L;
      if (filled % s.stride)
        __builtin_memset(p, 0, sizeof(float) * width);
      else
        fill_gradient(s, f, at, out + (int64_t)(filled / s.stride) * s.out_w * s.c, c, p);
    }
    const int64_t offset = in + (int64_t)h * row.w * s.c;
    const T* x = f.x + offset;
    T* du = f.du + offset;
    fill(row, x, act, slope);
    const Taps t = taps(kernel, s.up, s.dilation, s.h, last, -s.dilation, ring, pitch, slots);
    gradient_row(t, row.w, wt, dw, act, [&](int w, const vf* acc, auto columns) __attribute__((always_inline)) {
      constexpr int P = decltype(columns)::value;
      vf d[P], d1{}, d2{};
      NVAE_UNROLL for (int i = 0; i < P; i++) d[i] = acc[i] * load(slope + (w + i) * L);
      write<P>(du + (int64_t)w * s.c, s.c, d, at.n, streaming);
      if (!sums) return;
      NVAE_UNROLL for (int i = 0; i < P; i++) {
        const vf e = as_stored<T>(d[i]);
        d1 += e;
        d2 += e * (load_n(x + (int64_t)(w + i) * s.c, at.n) - mean);
      }
      s1 += d1;
      s2 += d2;
    });
    if (h % 4 == 3 || h == rows - 1)
      for (int k = 0; k < count; k++) total[k] += dw[k], dw[k] = vf{};
  }
  if (sums) {
    float* o = f.sums + at.image * 2 * s.c + at.c;
    store_n(o, s1, at.n);
    store_n(o + s.c, s2, at.n);
  }
  for (int k = 0; k < count; k++) store_n(f.dweight + (at.image * count + k) * s.c + at.c, total[k], at.n);
  stream_fence();
}

template <typename T>
constexpr depthwise_conv::Kernels<T> table{&forward<T>, &backward<T>};

}  // namespace nvae::NVAE_ISA::dw
