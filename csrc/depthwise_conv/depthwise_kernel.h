// Depthwise convolution, channels last, one task = one image x L channels. A task slides down the image with a ring of rows in
// the first-level cache: every input is loaded, normalised and activated once, every gradient is read once, and the sums that
// the neighbouring BatchNorms need ride along. Only the loops over taps are compiled per kernel size (3 and 5, dense; any other
// takes its sizes at run time).
#pragma once
#include "common/activation.h"
#include "depthwise_conv/depthwise_conv.h"

namespace nvae::NVAE_ISA::dw {

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

// row[w] = act(x[w] * scale + shift)
template <int ACT, typename T>
void fill_activated(const T* x, int64_t stride, int w_end, int n, vf scale, vf shift, float* row) {
  by_width(n, [&](auto get) __attribute__((always_inline)) {
    for (int w = 0; w < w_end; w++) {
      __builtin_prefetch(x + (int64_t)(w + w_end) * stride);
      store(row + w * L, activate<ACT>(get(x + w * stride) * scale + shift));
    }
  });
}

// value[w], slope[w] of act at x[w] * scale + shift
template <int ACT, typename T>
void fill_both(const T* x, int64_t stride, int w_end, int n, vf scale, vf shift, float* value, float* slope) {
  by_width(n, [&](auto get) __attribute__((always_inline)) {
    for (int w = 0; w < w_end; w++) {
      __builtin_prefetch(x + (int64_t)(w + w_end) * stride);
      vf a, d;
      activate_both<ACT>(get(x + w * stride) * scale + shift, a, d);
      store(value + w * L, a);
      store(slope + w * L, d);
    }
  });
}

// Streaming stores pay above the size of the second-level cache, and need whole aligned lines.
template <typename T>
inline bool may_stream(const T* p, int64_t c, int64_t elements) {
  return sizeof(T) == 4 && c % L == 0 && (uintptr_t)p % (L * 4) == 0 && elements > (1 << 18);
}

// y[w] = value(w), `stride` apart
template <typename T, typename F>
NVAE_ALWAYS void write_row(T* y, int64_t stride, int w_end, int n, bool streaming, const F& value) {
  if (streaming)
    for (int w = 0; w < w_end; w++) stream(y + w * stride, value(w));
  else if (n == L)
    for (int w = 0; w < w_end; w++) store(y + w * stride, value(w));
  else
    for (int w = 0; w < w_end; w++) store_n(y + w * stride, value(w), n);
}

struct Taps {
  int k, stride, dilation, k0, k1;  // rows k0 <= kh < k1 of the kernel lie inside the image
  const float* const* rows;         // rows[kh]: the input row under it, from the first tap of column 0
};

template <int K, int S, int P>
NVAE_ALWAYS void dense_columns(const Taps& t, int w, const vf* wt, float* line) {
  vf acc[P] = {};
  for (int kh = t.k0; kh < t.k1; kh++) {
    const float* p = t.rows[kh] + (int64_t)w * S * L;
    constexpr int N = (P - 1) * S + K;
    vf a[N];
    NVAE_UNROLL for (int i = 0; i < N; i++) a[i] = load(p + i * L);
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) {
      const vf k = wt[kh * K + kw];
      NVAE_UNROLL for (int i = 0; i < P; i++) acc[i] += k * a[i * S + kw];
    }
  }
  NVAE_UNROLL for (int i = 0; i < P; i++) store(line + (w + i) * L, acc[i]);
}

constexpr int kColumns = L == 16 ? 8 : 4;  // outputs in registers

template <int K, int S>
void dense_row(const Taps& t, int out_w, const vf* wt, float* line) {
  constexpr int P = S == 1 ? kColumns : 4;
  int w = 0;
  for (; w + P <= out_w; w += P) dense_columns<K, S, P>(t, w, wt, line);
  for (; w < out_w; w++) dense_columns<K, S, 1>(t, w, wt, line);
}

template <int P>
NVAE_ALWAYS void any_columns(const Taps& t, int w, const vf* wt, float* line) {
  vf acc[P] = {};
  for (int kh = t.k0; kh < t.k1; kh++)
    for (int kw = 0; kw < t.k; kw++) {
      const vf k = wt[kh * t.k + kw];
      const float* p = t.rows[kh] + ((int64_t)w * t.stride + kw * t.dilation) * L;
      NVAE_UNROLL for (int i = 0; i < P; i++) acc[i] += k * load(p + (int64_t)i * t.stride * L);
    }
  NVAE_UNROLL for (int i = 0; i < P; i++) store(line + (w + i) * L, acc[i]);
}

inline void convolve_row(const Taps& t, int out_w, const vf* wt, float* line) {
  if (t.dilation == 1 && t.k == 5) return t.stride == 1 ? dense_row<5, 1>(t, out_w, wt, line) : dense_row<5, 2>(t, out_w, wt, line);
  if (t.dilation == 1 && t.k == 3) return t.stride == 1 ? dense_row<3, 1>(t, out_w, wt, line) : dense_row<3, 2>(t, out_w, wt, line);
  int w = 0;
  for (; w + kColumns <= out_w; w += kColumns) any_columns<kColumns>(t, w, wt, line);
  for (; w < out_w; w++) any_columns<1>(t, w, wt, line);
}

// Rows of the ring that the taps of one output row see; `top` is the image row under the first.
inline Taps taps(const Shape& s, int top, int step, const float* ring, int64_t pitch, int ring_rows, const float** rows) {
  Taps t{s.kernel, s.stride, s.dilation, s.kernel, 0, rows};
  for (int kh = 0; kh < s.kernel; kh++) {
    const int in = top + kh * step;
    if (in < 0 || in >= s.h) continue;
    if (kh < t.k0) t.k0 = kh;
    t.k1 = kh + 1;
    rows[kh] = ring + in % ring_rows * pitch;
  }
  return t;
}

template <typename T>
void forward(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  const Place at = place(s, task);
  const int reach = s.dilation * (s.kernel - 1), pad = reach / 2, ring_rows = reach + 1;
  const int64_t pitch = (int64_t)(s.w + reach) * L;
  const auto fill = s.act == kSwish ? fill_activated<kSwish, T> : s.act == kElu ? fill_activated<kElu, T> : fill_activated<kIdentity, T>;
  vf wt[kMaxTaps];
  for (int k = 0; k < s.kernel * s.kernel; k++) wt[k] = load_n(f.weight + k * s.c + at.c, at.n);
  const vf scale = load_n(f.scale + at.c, at.n), shift = load_n(f.shift + at.c, at.n);
  const T* x = f.x + at.image * s.h * s.w * s.c + at.c;
  T* y = f.y + at.image * s.out_h * s.out_w * s.c + at.c;
  const bool streaming = at.n == L && may_stream(f.y, s.c, s.n * s.out_h * s.out_w * s.c);
  float *ring = scratch, *line = scratch + pitch * ring_rows;
  __builtin_memset(ring, 0, sizeof(float) * pitch * ring_rows);
  vf pivot{}, s1{}, s2{};
  int filled = 0;
  for (int ho = 0; ho < s.out_h; ho++) {
    const int top = ho * s.stride - pad, bottom = top + reach + 1;
    for (const int end = bottom < s.h ? bottom : s.h; filled < end; filled++)
      fill(x + (int64_t)filled * s.w * s.c, s.c, s.w, at.n, scale, shift, ring + filled % ring_rows * pitch + pad * L);
    const float* rows[depthwise_conv::kMaxKernel];
    convolve_row(taps(s, top, s.dilation, ring, pitch, ring_rows, rows), s.out_w, wt, line);
    if (!ho) pivot = load(line);
    T* out = y + (int64_t)ho * s.out_w * s.c;
    write_row(out, s.c, s.out_w, at.n, streaming, [&](int w) __attribute__((always_inline)) { return load(line + w * L); });
    if (f.stats)
      for (int w = 0; w < s.out_w; w++) {
        const vf e = load(line + w * L) - pivot;
        s1 += e;
        s2 += e * e;
      }
  }
  if (f.stats) {
    float* o = f.stats + at.image * 3 * s.c + at.c;
    store_n(o, pivot, at.n);
    store_n(o + s.c, s1, at.n);
    store_n(o + 2 * s.c, s2, at.n);
  }
  stream_fence();
}

// Input and weight gradient of P columns from one window of g:
// line[w] = sum g[h + pad - kh][w + pad - kw] * wt[kh][kw],  dw[kh][kw] += a[w] * g[h + pad - kh][w + pad - kw].
template <int K, int P>
NVAE_ALWAYS void dense_columns_back(const Taps& t, int w, const vf* wt, vf* dw, const float* act, float* line) {
  vf acc[P] = {};
  for (int kh = t.k0; kh < t.k1; kh++) {
    const float* p = t.rows[kh] + (int64_t)w * L;
    vf g[P + K - 1];
    NVAE_UNROLL for (int i = 0; i < P + K - 1; i++) g[i] = load(p + i * L);
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) {
      const vf k = wt[kh * K + kw];
      NVAE_UNROLL for (int i = 0; i < P; i++) acc[i] += k * g[i + K - 1 - kw];
    }
    vf e[K];
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) e[kw] = dw[kh * K + kw];
    NVAE_UNROLL for (int i = 0; i < P; i++) {
      const vf a = load(act + (w + i) * L);
      NVAE_UNROLL for (int kw = 0; kw < K; kw++) e[kw] += a * g[i + K - 1 - kw];
    }
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) dw[kh * K + kw] = e[kw];
  }
  NVAE_UNROLL for (int i = 0; i < P; i++) store(line + (w + i) * L, acc[i]);
}

template <int K>
void dense_row_back(const Taps& t, int w_end, const vf* wt, vf* dw, const float* act, float* line) {
  int w = 0;
  for (; w + kColumns <= w_end; w += kColumns) dense_columns_back<K, kColumns>(t, w, wt, dw, act, line);
  for (; w < w_end; w++) dense_columns_back<K, 1>(t, w, wt, dw, act, line);
}

template <int P>
NVAE_ALWAYS void any_columns_back(const Taps& t, int w, const vf* wt, vf* dw, const float* act, float* line) {
  vf acc[P] = {}, a[P];
  NVAE_UNROLL for (int i = 0; i < P; i++) a[i] = load(act + (w + i) * L);
  for (int kh = t.k0; kh < t.k1; kh++)
    for (int kw = 0; kw < t.k; kw++) {
      const vf k = wt[kh * t.k + kw];
      const float* p = t.rows[kh] + ((int64_t)w + (t.k - 1 - kw) * t.dilation) * L;
      vf e = dw[kh * t.k + kw];
      NVAE_UNROLL for (int i = 0; i < P; i++) {
        const vf g = load(p + i * L);
        acc[i] += k * g;
        e += a[i] * g;
      }
      dw[kh * t.k + kw] = e;
    }
  NVAE_UNROLL for (int i = 0; i < P; i++) store(line + (w + i) * L, acc[i]);
}

inline void gradient_row(const Taps& t, int w_end, const vf* wt, vf* dw, const float* act, float* line) {
  if (t.dilation == 1 && t.k == 5) return dense_row_back<5>(t, w_end, wt, dw, act, line);
  if (t.dilation == 1 && t.k == 3) return dense_row_back<3>(t, w_end, wt, dw, act, line);
  int w = 0;
  for (; w + kColumns <= w_end; w += kColumns) any_columns_back<kColumns>(t, w, wt, dw, act, line);
  for (; w < w_end; w++) any_columns_back<1>(t, w, wt, dw, act, line);
}

// With a stride, g stands at every stride-th pixel of a map of the input's size, zeros between: a stride-1 backward then.
template <typename T>
void backward(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  const Place at = place(s, task);
  const int reach = s.dilation * (s.kernel - 1), pad = reach / 2, ring_rows = reach + 1, taps_count = s.kernel * s.kernel;
  const int64_t pitch = (int64_t)(s.w + reach) * L, width = (int64_t)s.w * L;
  const auto fill = s.act == kSwish ? fill_both<kSwish, T> : s.act == kElu ? fill_both<kElu, T> : fill_both<kIdentity, T>;
  vf wt[kMaxTaps], dw[kMaxTaps], total[kMaxTaps];  // dw is added to total every few rows: shorter sums round less
  for (int k = 0; k < taps_count; k++) wt[k] = load_n(f.weight + k * s.c + at.c, at.n), dw[k] = total[k] = vf{};
  const vf scale = load_n(f.scale + at.c, at.n), shift = load_n(f.shift + at.c, at.n), mean = load_n(f.mean + at.c, at.n);
  const bool bn = f.c1 != nullptr;
  vf c0{}, c1{}, c2{};
  if (bn) c0 = load_n(f.c0 + at.c, at.n), c1 = load_n(f.c1 + at.c, at.n), c2 = load_n(f.c2 + at.c, at.n);
  const int64_t out = at.image * s.out_h * s.out_w * s.c + at.c, in = at.image * s.h * s.w * s.c + at.c;
  const T *dy = f.dy + out, *y = bn ? f.y + out : nullptr, *x = f.x + in;
  T* du = f.du + in;
  const bool streaming = at.n == L && may_stream(f.du, s.c, s.n * s.h * s.w * s.c);
  float *ring = scratch, *act = ring + pitch * ring_rows, *slope = act + width, *line = slope + width;
  __builtin_memset(ring, 0, sizeof(float) * pitch * ring_rows);
  vf s1{}, s2{};
  int filled = 0;
  for (int h = 0; h < s.h; h++) {
    for (const int end = h + pad < s.h ? h + pad + 1 : s.h; filled < end; filled++) {
      float* p = ring + filled % ring_rows * pitch + pad * L;
      if (filled % s.stride) {
        __builtin_memset(p, 0, sizeof(float) * width);
        continue;
      }
      const int64_t row = (int64_t)(filled / s.stride) * s.out_w * s.c;
      const T *q = dy + row, *t = bn ? y + row : nullptr;
      by_width(at.n, [&](auto get) __attribute__((always_inline)) {
        for (int w = 0; w < s.out_w; w++) {
          __builtin_prefetch(q + (int64_t)(w + s.out_w) * s.c);
          vf g = get(q + (int64_t)w * s.c);
          if (bn) {
            __builtin_prefetch(t + (int64_t)(w + s.out_w) * s.c);
            g = g * c0 + get(t + (int64_t)w * s.c) * c1 + c2;
          }
          store(p + (int64_t)w * s.stride * L, g);
        }
      });
    }
    const T* xr = x + (int64_t)h * s.w * s.c;
    fill(xr, s.c, s.w, at.n, scale, shift, act, slope);
    const float* rows[depthwise_conv::kMaxKernel];
    gradient_row(taps(s, h + pad, -s.dilation, ring, pitch, ring_rows, rows), s.w, wt, dw, act, line);
    if (h % 4 == 3 || h == s.h - 1)
      for (int k = 0; k < taps_count; k++) total[k] += dw[k], dw[k] = vf{};
    T* o = du + (int64_t)h * s.w * s.c;
    for (int w = 0; w < s.w; w++) store(line + w * L, load(line + w * L) * load(slope + w * L));
    write_row(o, s.c, s.w, at.n, streaming, [&](int w) __attribute__((always_inline)) { return load(line + w * L); });
    if (f.sums)
      by_width(at.n, [&](auto get) __attribute__((always_inline)) {
        for (int w = 0; w < s.w; w++) {
          const vf e = load(line + w * L);
          s1 += e;
          s2 += e * (get(xr + (int64_t)w * s.c) - mean);
        }
      });
  }
  if (f.sums) {
    float* o = f.sums + at.image * 2 * s.c + at.c;
    store_n(o, s1, at.n);
    store_n(o + s.c, s2, at.n);
  }
  for (int k = 0; k < taps_count; k++) store_n(f.dweight + (at.image * taps_count + k) * s.c + at.c, total[k], at.n);
  stream_fence();
}

constexpr depthwise_conv::Kernels table{L, &forward<float>, &forward<bf16>, &backward<float>, &backward<bf16>};

}  // namespace nvae::NVAE_ISA::dw
