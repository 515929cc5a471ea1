// The loops over taps of the depthwise kernels: the only part that is compiled per kernel size (3 and 5, dense; any other takes
// its sizes at run time). Rows lie in a ring in the first-level cache, L channels a pixel, zeros left and right.
#pragma once
#include "common/statistics.h"
#include "depthwise_conv/depthwise_conv.h"

namespace nvae::NVAE_ISA::dw {

constexpr int kColumns = L == 16 ? 8 : 4;  // outputs in registers

struct Taps {
  int k, stride, dilation, k0, k1;                    // rows k0 <= kh < k1 of the kernel lie inside the image
  const float* rows[depthwise_conv::kMaxKernel + 1];  // the row under each, from the first tap of column 0
};

// out(w, acc, Int<P>): P columns from w on.
template <int K, int S, int P, typename F>
NVAE_ALWAYS void dense_columns(const Taps& t, int w, const vf* wt, const F& out) {
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
  out(w, acc, Int<P>{});
}

template <int P, typename F>
NVAE_ALWAYS void any_columns(const Taps& t, int w, const vf* wt, const F& out) {
  vf acc[P] = {};
  for (int kh = t.k0; kh < t.k1; kh++)
    for (int kw = 0; kw < t.k; kw++) {
      const vf k = wt[kh * t.k + kw];
      const float* p = t.rows[kh] + ((int64_t)w * t.stride + kw * t.dilation) * L;
      NVAE_UNROLL for (int i = 0; i < P; i++) acc[i] += k * load(p + (int64_t)i * t.stride * L);
    }
  out(w, acc, Int<P>{});
}

template <int K, int S, typename F>
NVAE_ALWAYS void dense_row(const Taps& t, int columns, const vf* wt, const F& out) {
  constexpr int P = S == 1 ? kColumns : 4;
  int w = 0;
  for (; w + P <= columns; w += P) dense_columns<K, S, P>(t, w, wt, out);
  if constexpr (P > 4)
    for (; w + 4 <= columns; w += 4) dense_columns<K, S, 4>(t, w, wt, out);
  for (; w + 2 <= columns; w += 2) dense_columns<K, S, 2>(t, w, wt, out);
  for (; w < columns; w++) dense_columns<K, S, 1>(t, w, wt, out);
}

template <typename F>
NVAE_ALWAYS void convolve_row(const Taps& t, int columns, const vf* wt, const F& out) {
  if (t.dilation == 1 && t.k == 5) return t.stride == 1 ? dense_row<5, 1>(t, columns, wt, out) : dense_row<5, 2>(t, columns, wt, out);
  if (t.dilation == 1 && t.k == 3) return t.stride == 1 ? dense_row<3, 1>(t, columns, wt, out) : dense_row<3, 2>(t, columns, wt, out);
  int w = 0;
  for (; w + kColumns <= columns; w += kColumns) any_columns<kColumns>(t, w, wt, out);
  for (; w < columns; w++) any_columns<1>(t, w, wt, out);
}

// Input and weight gradient of P columns from one window of g, which lies S columns further for each:
// acc[w] = sum g[row kh][S w + K - 1 - kw] * wt[kh][kw],  dw[kh][kw] += a[w] * g[row kh][S w + K - 1 - kw].
template <int K, int S, int P, typename F>
NVAE_ALWAYS void dense_columns_back(const Taps& t, int w, const vf* wt, vf* dw, const float* act, const F& out) {
  vf acc[P] = {};
  for (int kh = t.k0; kh < t.k1; kh++) {
    const float* p = t.rows[kh] + (int64_t)w * S * L;
    constexpr int N = (P - 1) * S + K;
    vf g[N];
    NVAE_UNROLL for (int i = 0; i < N; i++) g[i] = load(p + i * L);
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) {
      const vf k = wt[kh * K + kw];
      NVAE_UNROLL for (int i = 0; i < P; i++) acc[i] += k * g[i * S + K - 1 - kw];
    }
    vf e[K];
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) e[kw] = dw[kh * K + kw];
    NVAE_UNROLL for (int i = 0; i < P; i++) {
      const vf a = load(act + (w + i) * L);
      NVAE_UNROLL for (int kw = 0; kw < K; kw++) e[kw] += a * g[i * S + K - 1 - kw];
    }
    NVAE_UNROLL for (int kw = 0; kw < K; kw++) dw[kh * K + kw] = e[kw];
  }
  out(w, acc, Int<P>{});
}

template <int P, typename F>
NVAE_ALWAYS void any_columns_back(const Taps& t, int w, const vf* wt, vf* dw, const float* act, const F& out) {
  vf acc[P] = {}, a[P];
  NVAE_UNROLL for (int i = 0; i < P; i++) a[i] = load(act + (w + i) * L);
  for (int kh = t.k0; kh < t.k1; kh++)
    for (int kw = 0; kw < t.k; kw++) {
      const vf k = wt[kh * t.k + kw];
      const float* p = t.rows[kh] + ((int64_t)w * t.stride + (t.k - 1 - kw) * t.dilation) * L;
      vf e = dw[kh * t.k + kw];
      NVAE_UNROLL for (int i = 0; i < P; i++) {
        const vf g = load(p + (int64_t)i * t.stride * L);
        acc[i] += k * g;
        e += a[i] * g;
      }
      dw[kh * t.k + kw] = e;
    }
  out(w, acc, Int<P>{});
}

template <int K, int S, typename F>
NVAE_ALWAYS void dense_row_back(const Taps& t, int columns, const vf* wt, vf* dw, const float* act, const F& out) {
  constexpr int P = kColumns / S;
  int w = 0;
  for (; w + P <= columns; w += P) dense_columns_back<K, S, P>(t, w, wt, dw, act, out);
  if constexpr (P > 4)
    for (; w + 4 <= columns; w += 4) dense_columns_back<K, S, 4>(t, w, wt, dw, act, out);
  if constexpr (P > 2)
    for (; w + 2 <= columns; w += 2) dense_columns_back<K, S, 2>(t, w, wt, dw, act, out);
  for (; w < columns; w++) dense_columns_back<K, S, 1>(t, w, wt, dw, act, out);
}

template <typename F>
NVAE_ALWAYS void gradient_row(const Taps& t, int columns, const vf* wt, vf* dw, const float* act, const F& out) {
  if (t.dilation == 1 && t.stride == 1 && t.k == 5) return dense_row_back<5, 1>(t, columns, wt, dw, act, out);
  if (t.dilation == 1 && t.stride == 1 && t.k == 3) return dense_row_back<3, 1>(t, columns, wt, dw, act, out);
  if (t.stride == 2 && t.k == 6) return dense_row_back<6, 2>(t, columns, wt, dw, act, out);  // never dilated
  int w = 0;
  for (; w + kColumns <= columns; w += kColumns) any_columns_back<kColumns>(t, w, wt, dw, act, out);
  for (; w < columns; w++) any_columns_back<1>(t, w, wt, dw, act, out);
}

}  // namespace nvae::NVAE_ISA::dw
