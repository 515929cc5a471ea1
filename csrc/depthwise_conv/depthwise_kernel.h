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

constexpr int kMaxTaps = depthwise_conv::kMaxKernel * depthwise_conv::kMaxKernel;

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

// One row of x in memory and as it lies in scratch: each of `w` pixels `up` times.
struct Row {
  int64_t stride;
  int w, n, up;
  vf scale, shift;
};
inline Row row_of(const Shape& s, const Place& at, const float* bn) {
  Row r{s.c, s.w / s.up, at.n, s.up, splat(1.0f), vf{}};
  if (bn) r.scale = load_n(bn + kScale * s.c + at.c, at.n), r.shift = load_n(bn + kShift * s.c + at.c, at.n);
  return r;
}

// row[w] = act(u)
template <int ACT, typename T>
void fill_activated(const Row& r, const T* x, float* row) {
  by_width(r.n, [&](auto get) __attribute__((always_inline)) {
    if (r.up == 1)
      for (int w = 0; w < r.w; w++) {
        __builtin_prefetch(x + (int64_t)(w + r.w) * r.stride);
        store(row + w * L, activate<ACT>(get(x + w * r.stride) * r.scale + r.shift));
      }
    else
      for (int w = 0; w < r.w; w++) {
        const vf a = activate<ACT>(get(x + w * r.stride) * r.scale + r.shift);
        store(row + 2 * w * L, a);
        store(row + (2 * w + 1) * L, a);
      }
  });
}

// value[w] = act(u), `up` times; slope[w] = act'(u), once.
template <int ACT, typename T>
void fill_both(const Row& r, const T* x, float* value, float* slope) {
  by_width(r.n, [&](auto get) __attribute__((always_inline)) {
    for (int w = 0; w < r.w; w++) {
      __builtin_prefetch(x + (int64_t)(w + r.w) * r.stride);
      vf a, d;
      activate_both<ACT>(get(x + w * r.stride) * r.scale + r.shift, a, d);
      for (int i = 0; i < r.up; i++) store(value + (w * r.up + i) * L, a);
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

// Rows of the ring that the taps of one output row see; `top` is the image row under the first. Row r of the image lies in slot
// r / up % slots.
inline Taps taps(const Shape& s, int top, int step, const float* ring, int64_t pitch, int slots, int up) {
  Taps t{s.kernel, s.stride, s.dilation, s.kernel, 0, {}};
  for (int kh = 0; kh < s.kernel; kh++) {
    const int in = top + kh * step;
    if (in < 0 || in >= s.h) continue;
    if (kh < t.k0) t.k0 = kh;
    t.k1 = kh + 1;
    t.rows[kh] = ring + in / up % slots * pitch;
  }
  return t;
}

template <typename T>
void forward(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  const Place at = place(s, task);
  const int reach = s.dilation * (s.kernel - 1), pad = reach / 2, slots = reach + 1;
  const int64_t pitch = (int64_t)(s.w + reach) * L;
  const auto fill = s.act == kSwish ? fill_activated<kSwish, T> : s.act == kElu ? fill_activated<kElu, T> : fill_activated<kIdentity, T>;
  vf wt[kMaxTaps];
  for (int k = 0; k < s.kernel * s.kernel; k++) wt[k] = load_n(f.weight + k * s.c + at.c, at.n);
  const Row row = row_of(s, at, f.bn);
  const int rows = s.h / s.up;
  const T* x = f.x + at.image * rows * row.w * s.c + at.c;
  T* y = f.y + at.image * s.out_h * s.out_w * s.c + at.c;
  const bool streaming = at.n == L && may_stream(f.y, s.c, s.n * s.out_h * s.out_w * s.c), stats = f.stats != nullptr;
  float* ring = scratch;
  __builtin_memset(ring, 0, sizeof(float) * pitch * slots);
  vf pivot{}, s1{}, s2{};
  int filled = 0;
  for (int ho = 0; ho < s.out_h; ho++) {
    const int top = ho * s.stride - pad, bottom = (top + reach) / s.up + 1;
    for (const int end = bottom < rows ? bottom : rows; filled < end; filled++)
      fill(row, x + (int64_t)filled * row.w * s.c, ring + filled % slots * pitch + pad * L);
    T* out = y + (int64_t)ho * s.out_w * s.c;
    convolve_row(taps(s, top, s.dilation, ring, pitch, slots, s.up), s.out_w, wt,
                 [&](int w, const vf* acc, auto columns) __attribute__((always_inline)) {
                   constexpr int P = decltype(columns)::value;
                   write<P>(out + (int64_t)w * s.c, s.c, acc, at.n, streaming);
                   if (!stats) return;
                   if (!ho && !w) {  // the mean of the first block: one pixel may lie several deviations off
                     NVAE_UNROLL for (int i = 0; i < P; i++) pivot += as_stored<T>(acc[i]);
                     pivot *= 1.0f / P;
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

// With a stride, g stands at every stride-th pixel of a map of the image's size, zeros between: a stride-1 backward then.
template <typename T>
void backward(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  const Place at = place(s, task);
  const int reach = s.dilation * (s.kernel - 1), pad = reach / 2, slots = reach + 1, taps_count = s.kernel * s.kernel;
  const int64_t pitch = (int64_t)(s.w + reach) * L, width = (int64_t)s.w * L;
  const auto fill = s.act == kSwish ? fill_both<kSwish, T> : s.act == kElu ? fill_both<kElu, T> : fill_both<kIdentity, T>;
  vf wt[kMaxTaps], dw[kMaxTaps], total[kMaxTaps];  // dw is added to total every few rows: shorter sums round less
  for (int k = 0; k < taps_count; k++) wt[k] = load_n(f.weight + k * s.c + at.c, at.n), dw[k] = total[k] = vf{};
  const Row row = row_of(s, at, f.bn);
  const vf mean = f.bn ? load_n(f.bn + kMean * s.c + at.c, at.n) : vf{};
  vf c[3] = {};
  if (f.c)
    for (int i = 0; i < 3; i++) c[i] = load_n(f.c + i * s.c + at.c, at.n);
  const int rows = s.h / s.up;
  const int64_t out = at.image * s.out_h * s.out_w * s.c + at.c, in = at.image * rows * row.w * s.c + at.c;
  const bool streaming = at.n == L && may_stream(f.du, s.c, s.n * rows * row.w * s.c), sums = f.sums != nullptr;
  float *ring = scratch, *act = ring + pitch * slots, *slope = act + width, *below = slope + width;
  __builtin_memset(ring, 0, sizeof(float) * pitch * slots);
  vf s1{}, s2{};
  int filled = 0;
  for (int h = 0; h < s.h; h++) {
    for (const int end = h + pad < s.h ? h + pad + 1 : s.h; filled < end; filled++) {
      float* p = ring + filled % slots * pitch + pad * L;
      if (filled % s.stride)
        __builtin_memset(p, 0, sizeof(float) * width);
      else
        fill_gradient(s, f, at, out + (int64_t)(filled / s.stride) * s.out_w * s.c, c, p);
    }
    const int64_t offset = in + (int64_t)(h / s.up) * row.w * s.c;
    const T* x = f.x + offset;
    T* du = f.du + offset;
    if (h % s.up == 0) fill(row, x, act, slope);
    const auto emit = [&](int w, const vf* acc, auto columns) __attribute__((always_inline)) {
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
    };
    const Taps t = taps(s, h + pad, -s.dilation, ring, pitch, slots, 1);
    if (s.up == 1) {
      gradient_row(t, s.w, wt, dw, act, emit);
    } else {  // the gradients of 2 x 2 pixels are one pixel's of x: gathered over two rows, then over pairs
      gradient_row(t, s.w, wt, dw, act, [&](int w, const vf* acc, auto columns) __attribute__((always_inline)) {
        NVAE_UNROLL for (int i = 0; i < decltype(columns)::value; i++) {
          float* p = below + (w + i) * L;
          store(p, h % 2 ? acc[i] + load(p) : acc[i]);
        }
      });
      if (h % 2)
        for (int w = 0; w < row.w; w++) {
          const vf pair = load(below + 2 * w * L) + load(below + (2 * w + 1) * L);
          emit(w, &pair, Int<1>{});
        }
    }
    if (h % 4 == 3 || h == s.h - 1)
      for (int k = 0; k < taps_count; k++) total[k] += dw[k], dw[k] = vf{};
  }
  if (sums) {
    float* o = f.sums + at.image * 2 * s.c + at.c;
    store_n(o, s1, at.n);
    store_n(o + s.c, s2, at.n);
  }
  for (int k = 0; k < taps_count; k++) store_n(f.dweight + (at.image * taps_count + k) * s.c + at.c, total[k], at.n);
  stream_fence();
}

template <typename T>
constexpr depthwise_conv::Kernels<T> table{&forward<T>, &backward<T>};

}  // namespace nvae::NVAE_ISA::dw
