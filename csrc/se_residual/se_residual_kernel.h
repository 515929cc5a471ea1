// Squeeze-excitation with the residual sum, one image a task: two passes over x forward (pool, then scale and add), two over dy
// backward. The normalisation before it is an affine map per channel that both passes carry along.
#pragma once
#include "common/statistics.h"
#include "se_residual/se_residual.h"

namespace nvae::NVAE_ISA::se {

using se_residual::Affine;
using se_residual::Gate;
using se_residual::Image;
using se_residual::Shape;

constexpr int64_t kTerms = 16;  // pixels that are summed apart: rounding grows with a block, not with the image

// A sum of blocks with what its additions lost (Kahan).
struct Sum {
  vf value{}, lost{};
  NVAE_ALWAYS void add(vf x) {
    const vf y = x - lost, next = value + y;
    lost = (next - value) - y;
    value = next;
  }
};

// f(p, end): the blocks of an image.
template <typename F>
NVAE_ALWAYS void for_blocks(const Shape& s, const F& f) {
  for (int64_t p = 0; p < s.pixels; p += kTerms) f(p, p + kTerms < s.pixels ? p + kTerms : s.pixels);
}

template <typename T>
void pool(const Shape& s, const T* x, float* means) {
  const float inverse = 1.0f / (float)s.pixels;
  for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value;
    Sum sum[NV];
    for_blocks(s, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      vf part[NV] = {};
      for (int64_t p = begin; p < end; p++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) part[v] += load_n(x + p * s.channels + c + v * L, n);
      NVAE_UNROLL for (int v = 0; v < NV; v++) sum[v].add(part[v]);
    });
    NVAE_UNROLL for (int v = 0; v < NV; v++) store_n(means + c + v * L, sum[v].value * inverse, n);
  });
}

// squeezed = relu(w1 pooled + b1), gate = sigmoid(w2 squeezed + b2) and its slope; pooled comes in where the gate goes out.
inline void excite(const Shape& s, const Gate& g, const Image& image) {
  for (int64_t h = 0; h < s.hidden; h++) {
    vf dot{};
    for (int64_t c = 0; c < s.channels; c += L) {
      const int n = (int)(s.channels - c < L ? s.channels - c : L);
      dot += load_n(g.w1 + h * s.channels + c, n) * load_n(image.gate + c, n);
    }
    const float t = sum(dot) + g.b1[h];
    image.squeezed[h] = t <= 0 ? 0 : t;  // NaN stays
  }
  for (int64_t c = 0; c < s.channels; c += L) {
    const int n = (int)(s.channels - c < L ? s.channels - c : L);
    vf t = load_n(g.b2 + c, n);
    for (int64_t h = 0; h < s.hidden; h++) t += load_n(g.w2 + h * s.channels + c, n) * image.squeezed[h];
    const vf gate = sigmoid(t);
    store_n(image.gate + c, gate, n);
    store_n(image.slope + c, gate * sigmoid(-t), n);
  }
}

template <typename T>
void forward(const Shape& s, const Gate& g, const T* skip, const T* x, const Affine& v, const float* x_means, const Image& image, T* y,
             float* stats, int64_t task) {
  const int64_t offset = task * s.pixels * s.channels;
  x += offset, skip += offset, y += offset;
  if (s.hidden) {
    if (x_means)
      __builtin_memcpy(image.x_mean, x_means, sizeof(float) * s.channels);
    else
      pool(s, x, image.x_mean);
    for (int64_t c = 0; c < s.channels; c++)
      image.gate[c] = image.x_mean[c] * (v.scale ? v.scale[c] : 1.0f) + (v.shift ? v.shift[c] : 0.0f);
    excite(s, g, image);
  }
  for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value;
    vf a[NV], b[NV];
    NVAE_UNROLL for (int i = 0; i < NV; i++) {
      const int64_t e = c + i * L;
      const vf gate = s.residual_scale * (s.hidden ? load_n(image.gate + e, n) : splat(1.0f));
      a[i] = v.scale ? gate * load_n(v.scale + e, n) : gate;
      b[i] = v.shift ? gate * load_n(v.shift + e, n) : vf{};
    }
    for (int64_t p = 0; p < s.pixels; p++)
      NVAE_UNROLL for (int j = 0; j < NV; j++) {
        const int64_t i = p * s.channels + c + j * L;
        store_n(y + i, load_n(skip + i, n) + (load_n(x + i, n) * a[j] + b[j]), n);
      }
  });
  constexpr int64_t kTile = 64;
  for (int64_t p = 0; stats && p < s.pixels; p += kTile)
    add_stats(y + p * s.channels, s.channels, s.pixels - p < kTile ? s.pixels - p : kTile, s.channels, stats, s.channels, p);
}

template <typename T>
void sums(const Shape& s, const T* dy, const T* x, const Affine& affine, float* out, int64_t task) {
  const int64_t offset = task * s.pixels * s.channels;
  for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value;
    vf mean[NV];
    Sum s1[NV], s2[NV];
    NVAE_UNROLL for (int v = 0; v < NV; v++) mean[v] = affine.mean ? load_n(affine.mean + c + v * L, n) : vf{};
    for_blocks(s, [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      vf t1[NV] = {}, t2[NV] = {};
      for (int64_t p = begin; p < end; p++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          const int64_t i = offset + p * s.channels + c + v * L;
          const vf d = load_n(dy + i, n);
          t1[v] += d;
          t2[v] += d * (load_n(x + i, n) - mean[v]);
        }
      NVAE_UNROLL for (int v = 0; v < NV; v++) s1[v].add(t1[v]), s2[v].add(t2[v]);
    });
    NVAE_UNROLL for (int v = 0; v < NV; v++) {
      store_n(out + c + v * L, s1[v].value, n);
      store_n(out + s.channels + c + v * L, s2[v].value, n);
    }
  });
}

template <typename T>
void backward(const Shape& s, const T* dy, const float* a, const float* b, T* dx, int64_t task) {
  const int64_t offset = task * s.pixels * s.channels;
  for_channels(s.channels, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value;
    vf ga[NV], gb[NV];
    NVAE_UNROLL for (int v = 0; v < NV; v++) ga[v] = load_n(a + c + v * L, n), gb[v] = load_n(b + c + v * L, n);
    for (int64_t p = 0; p < s.pixels; p++)
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        const int64_t i = offset + p * s.channels + c + v * L;
        store_n(dx + i, load_n(dy + i, n) * ga[v] + gb[v], n);
      }
  });
}

template <typename T>
constexpr se_residual::Kernels<T> table{&forward<T>, &sums<T>, &backward<T>};

}  // namespace nvae::NVAE_ISA::se
