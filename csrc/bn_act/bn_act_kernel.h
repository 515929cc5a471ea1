// BatchNorm and activation over dense rows: statistics, forward, the two sums of the backward, and its elementwise half.
#pragma once
#include "bn_act/bn_act.h"
#include "common/activation.h"
#include "common/statistics.h"

namespace nvae::NVAE_ISA::bn {

using bn_act::Also;
using bn_act::kMean;
using bn_act::kScale;
using bn_act::kShift;
using bn_act::Shape;

constexpr int64_t kTile = 64;  // rows that are swept channel block by channel block

// f(m0, rows): the tiles of a task.
template <typename F>
NVAE_ALWAYS void for_tiles(const Shape& s, int64_t task, const F& f) {
  const int64_t begin = task * s.chunk, end = begin + s.chunk < s.rows ? begin + s.chunk : s.rows;
  for (int64_t m = begin; m < end; m += kTile) f(m, end - m < kTile ? end - m : kTile);
}

template <typename T>
void stats(const Shape& s, const T* x, float* partial, int64_t task) {
  for_tiles(s, task, [&](int64_t m, int64_t rows) __attribute__((always_inline)) {
    add_stats(x + m * s.channels, s.channels, rows, s.channels, partial, s.channels, m - task * s.chunk);
  });
}

template <int ACT, typename T>
void forward_act(const Shape& s, const T* x, const float* bn, T* y, int64_t task) {
  for_tiles(s, task, [&](int64_t m0, int64_t rows) __attribute__((always_inline)) {
    for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
      constexpr int NV = decltype(vectors)::value;
      vf scale[NV], shift[NV];
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        scale[v] = load_n(bn + kScale * s.channels + c + v * L, n);
        shift[v] = load_n(bn + kShift * s.channels + c + v * L, n);
      }
      for (int64_t m = m0; m < m0 + rows; m++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          const int64_t i = m * s.channels + c + v * L;
          store_n(y + i, activate<ACT>(load_n(x + i, n) * scale[v] + shift[v]), n);
        }
    });
  });
}

template <int ACT, typename T>
void sums_act(const Shape& s, const T* dy, const T* x, const float* bn, float* partial, int64_t task) {
  __builtin_memset(partial, 0, sizeof(float) * 2 * s.channels);
  for_tiles(s, task, [&](int64_t m0, int64_t rows) __attribute__((always_inline)) {
    for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
      constexpr int NV = decltype(vectors)::value;
      vf scale[NV], shift[NV], mean[NV], s1[NV], s2[NV];
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        scale[v] = load_n(bn + kScale * s.channels + c + v * L, n);
        shift[v] = load_n(bn + kShift * s.channels + c + v * L, n);
        mean[v] = load_n(bn + kMean * s.channels + c + v * L, n);
        s1[v] = s2[v] = vf{};
      }
      for (int64_t m = m0; m < m0 + rows; m++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          const int64_t i = m * s.channels + c + v * L;
          const vf t = load_n(x + i, n);
          vf value, slope;
          activate_both<ACT>(t * scale[v] + shift[v], value, slope);
          const vf du = load_n(dy + i, n) * slope;
          s1[v] += du;
          s2[v] += du * (t - mean[v]);
        }
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        float *a = partial + c + v * L, *b = a + s.channels;
        store_n(a, load_n(a, n) + s1[v], n);
        store_n(b, load_n(b, n) + s2[v], n);
      }
    });
  });
}

// bn null: du = dy; ALSO: how many other gradients are added
template <int ACT, bool BN, int ALSO, typename T>
void backward_of(const Shape& s, const T* dy, const T* x, const float* bn, const float* coef, Also<T> others, T* dx, int64_t task) {
  const T *also = others.first, *also2 = others.second;
  for_tiles(s, task, [&](int64_t m0, int64_t rows) __attribute__((always_inline)) {
    for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
      constexpr int NV = decltype(vectors)::value;
      vf scale[NV], shift[NV], c0[NV], c1[NV], c2[NV];
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        const int64_t e = c + v * L;
        scale[v] = BN ? load_n(bn + kScale * s.channels + e, n) : splat(1.0f);
        shift[v] = BN ? load_n(bn + kShift * s.channels + e, n) : vf{};
        c0[v] = load_n(coef + e, n), c1[v] = load_n(coef + s.channels + e, n), c2[v] = load_n(coef + 2 * s.channels + e, n);
      }
      for (int64_t m = m0; m < m0 + rows; m++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          const int64_t i = m * s.channels + c + v * L;
          const vf t = load_n(x + i, n);
          vf du = load_n(dy + i, n);
          if constexpr (BN) {
            vf value, slope;
            activate_both<ACT>(t * scale[v] + shift[v], value, slope);
            du *= slope;
          }
          vf out = du * c0[v] + t * c1[v] + c2[v];
          if constexpr (ALSO > 0) out += load_n(also + i, n);
          if constexpr (ALSO > 1) out += load_n(also2 + i, n);
          store_n(dx + i, out, n);
        }
    });
  });
}

template <int ACT, bool BN, typename T>
void backward_act(const Shape& s, const T* dy, const T* x, const float* bn, const float* c, Also<T> also, T* dx, int64_t task) {
  const auto run = also.second  ? backward_of<ACT, BN, 2, T>
                   : also.first ? backward_of<ACT, BN, 1, T>
                                : backward_of<ACT, BN, 0, T>;
  run(s, dy, x, bn, c, also, dx, task);
}

template <typename T>
void forward(const Shape& s, const T* x, const float* bn, T* y, int64_t task) {
  const auto run = s.act == kSwish ? forward_act<kSwish, T> : s.act == kElu ? forward_act<kElu, T> : forward_act<kIdentity, T>;
  run(s, x, bn, y, task);
}
template <typename T>
void sums(const Shape& s, const T* dy, const T* x, const float* bn, float* partial, int64_t task) {
  const auto run = s.act == kSwish ? sums_act<kSwish, T> : s.act == kElu ? sums_act<kElu, T> : sums_act<kIdentity, T>;
  run(s, dy, x, bn, partial, task);
}
template <typename T>
void backward(const Shape& s, const T* dy, const T* x, const float* bn, const float* c, Also<T> also, T* dx, int64_t task) {
  const auto run = s.act == kSwish ? backward_act<kSwish, true, T>
                   : s.act == kElu ? backward_act<kElu, true, T>
                                   : backward_act<kIdentity, true, T>;
  run(s, dy, x, bn, c, also, dx, task);
}
template <typename T>
void affine(const Shape& s, const T* x, const float* c, Also<T> also, T* du, int64_t task) {
  backward_act<kIdentity, false, T>(s, du, x, nullptr, c, also, du, task);
}

template <typename T>
constexpr bn_act::Kernels<T> table{&stats<T>, &forward<T>, &sums<T>, &backward<T>, &affine<T>};

}  // namespace nvae::NVAE_ISA::bn
