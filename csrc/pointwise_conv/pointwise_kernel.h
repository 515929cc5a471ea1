// 1x1 convolution as a product of tiles that stay in the second-level cache. The BatchNorm and activation before it are applied
// while a tile is read, the sums for the BatchNorm behind it are taken while a tile is written.
#pragma once
#include <type_traits>

#include "bn_act/bn_act.h"
#include "common/activation.h"
#include "common/gemm.h"
#include "common/statistics.h"
#include "pointwise_conv/pointwise_conv.h"

namespace nvae::NVAE_ISA::pw {

using bn_act::kMean;
using bn_act::kScale;
using bn_act::kShift;
using pointwise_conv::Backward;
using pointwise_conv::Forward;
using pointwise_conv::kRows;
using pointwise_conv::Shape;

constexpr int64_t kTile = 128 * 1024;  // floats of a tile that is read again and again: 512 KB
constexpr int64_t kDepth = 512;       // input channels of a forward tile

// Row pitch of a tile: whole vectors, and not a power of two of cache lines.
inline int64_t pitch(int64_t n) { return (n + L - 1) / L * L + L; }
// Rows of a tile that is `width` wide.
inline int tile_rows(int64_t width) {
  int rows = kRows;
  while (rows > 2 * MR && rows * width > kTile) rows /= 2;
  return rows;
}

// f(activation, whether there is a BatchNorm before it), as types.
template <typename F>
void by_prologue(int act, const float* bn, const F& f) {
  const auto with = [&](auto a) { bn ? f(a, std::true_type()) : f(a, std::false_type()); };
  if (act == kSwish)
    with(std::integral_constant<int, kSwish>());
  else if (act == kElu)
    with(std::integral_constant<int, kElu>());
  else
    with(std::integral_constant<int, kIdentity>());
}

// tile[m][c] = act(u), u = x without bn; channels behind `width` are zero up to a whole vector.
template <int ACT, bool BN, typename T>
void read_tile(const T* x, int64_t ldx, int rows, int64_t width, const float* bn, float* tile, int64_t ld) {
  for_channels(width, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value;
    vf scale[NV], shift[NV];
    NVAE_UNROLL for (int v = 0; v < NV; v++) {
      scale[v] = BN ? load_n(bn + kScale * ldx + c + v * L, n) : splat(1.0f);
      shift[v] = BN ? load_n(bn + kShift * ldx + c + v * L, n) : vf{};
    }
    for (int m = 0; m < rows; m++)
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        const vf t = load_n(x + m * ldx + c + v * L, n);
        store(tile + m * ld + c + v * L, activate<ACT>(BN ? t * scale[v] + shift[v] : t));
      }
  });
}

// Sums of each image's rows of a panel of y into that image's row of pixel_sums; those of a tile are summed apart, for rounding
// to grow with a tile.
template <typename T>
void add_pixel_sums(const Shape& s, const T* tile, int64_t ld, int64_t r, int rows, int n, float* sums, bool first_tile) {
  for (int m = 0; m < rows;) {
    const int64_t image = (r + m) / s.pixels, left = (image + 1) * s.pixels - (r + m);
    const int end = left < rows - m ? m + (int)left : rows;
    const bool fresh = first_tile ? true : m > 0 || (r + m) % s.pixels == 0;
    float* out = sums + image * s.out;
    vf t{};
    for (; m < end; m++) t += load_n(tile + m * ld, n);
    store_n(out, fresh ? t : t + load_n(out, n), n);
  }
}

// c[m][...] += bias + addend for the columns j to j + width.
template <typename T>
void add_behind(const Forward<T>& f, int64_t out, int64_t r, int rows, int64_t j, int64_t width, float* c, int64_t ldo) {
  for_channels(width, [&](int64_t e, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value;
    vf bias[NV] = {};
    if (f.bias) NVAE_UNROLL for (int v = 0; v < NV; v++) bias[v] = load_n(f.bias + j + e + v * L, n);
    for (int m = 0; m < rows; m++)
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        float* p = c + m * ldo + e + v * L;
        vf t = load(p) + bias[v];
        if (f.addend) t += load_n(f.addend + (r + m) * out + j + e + v * L, n);
        store(p, t);
      }
  });
}

template <int ACT, bool BN, typename T>
void forward_act(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  const int64_t begin = task * s.chunk, end = begin + s.chunk < s.m ? begin + s.chunk : s.m;
  float *stats = f.stats ? f.stats + task * 3 * s.out : nullptr, *images = f.pixel_sums ? f.pixel_sums + task * s.out : nullptr;
  const bool streaming = may_stream(f.y, s.out, s.m * s.out), whole = s.in <= kDepth;
  const int64_t lda = pitch(whole ? s.in : kDepth), ldo = whole ? PANEL : pitch(s.out);
  const int tile = tile_rows(whole ? lda : lda + ldo);
  float *a = scratch, *o = scratch + tile * lda;
  for (int64_t r = begin; r < end; r += tile) {
    const int rows = (int)(end - r < tile ? end - r : tile);
    for (int64_t k = 0; k == 0 || k < s.in; k += kDepth) {  // once without channels: an empty sum
      const int64_t depth = s.in - k < kDepth ? s.in - k : kDepth;
      read_tile<ACT, BN>(f.x + r * s.in + k, s.in, rows, depth, BN ? f.bn + k : nullptr, a, lda);
      const bool last = k + depth == s.in;
      for (int64_t j = 0; j < s.out; j += PANEL) {
        const int64_t width = s.out - j < PANEL ? s.out - j : PANEL;
        const int nv = (int)((width + L - 1) / L);
        float* c = whole ? o : o + j;
        gemm_panel(nv, rows, depth, a, lda, 1, f.packed + (j / PANEL * s.in + k) * PANEL, PANEL, c, ldo, k > 0);
        if (!last) continue;
        if (f.bias || f.addend) add_behind(f, s.out, r, rows, j, width, c, ldo);
        T* y = f.y + r * s.out + j;
        for (int v = 0; v < nv; v++) {
          const int n = (int)(width - v * L < L ? width - v * L : L);
          if (streaming)
            for (int m = 0; m < rows; m++) stream(y + m * s.out + v * L, load(c + m * ldo + v * L));
          else
            for (int m = 0; m < rows; m++) store_n(y + m * s.out + v * L, load(c + m * ldo + v * L), n);
          // sums are taken over the stored values: bfloat16 is read back, float is still in the tile
          if (images && sizeof(T) == 4) add_pixel_sums(s, c + v * L, ldo, r, rows, n, images + j + v * L, r == begin);
          if (images && sizeof(T) == 2) add_pixel_sums(s, y + v * L, s.out, r, rows, n, images + j + v * L, r == begin);
        }
        if (stats && sizeof(T) == 4) add_stats(c, ldo, rows, width, stats + j, s.out, r - begin);
        if (stats && sizeof(T) == 2) add_stats(y, s.out, rows, width, stats + j, s.out, r - begin);
      }
    }
  }
  stream_fence();
}

// The tile of dW that the last, partial vector would overrun: through a buffer.
inline void add_narrow_dweight(const Shape& s, const float* g, int64_t ldg, int rows, const float* a, int64_t width, float* dw,
                               bool first) {
  const int nv = (int)((width + L - 1) / L);
  alignas(64) float block[MR * PANEL];
  for (int64_t o = 0; o < s.out; o += MR) {
    const int64_t count = s.out - o < MR ? s.out - o : MR;
    gemm_panel(nv, count, rows, g + o, 1, ldg, a, PANEL, block, PANEL, false);
    for (int64_t i = 0; i < count; i++)
      for (int v = 0; v < nv; v++) {
        const int n = (int)(width - v * L < L ? width - v * L : L);
        float* p = dw + (o + i) * s.in + v * L;
        vf t = load(block + i * PANEL + v * L);
        if (!first) t += load_n(p, n);
        store_n(p, t, n);
      }
  }
}

template <int ACT, bool BN, typename T>
void backward_act(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  const int64_t begin = task * s.chunk, end = begin + s.chunk < s.m ? begin + s.chunk : s.m;
  const int64_t ldg = pitch(s.out);
  const int tile = tile_rows(ldg);
  float *g = scratch, *a = g + tile * ldg;
  float *sums = f.sums ? f.sums + task * 2 * s.in : nullptr, *dw = f.dweight + task * s.out * s.in;
  const bool streaming = may_stream(f.du, s.in, s.m * s.in);
  for (int64_t r = begin; r < end; r += tile) {
    const int rows = (int)(end - r < tile ? end - r : tile);
    const bool first = r == begin;
    for_channels(s.out, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
      constexpr int NV = decltype(vectors)::value;
      const T *dy = f.dy + r * s.out + c, *y = f.c12 ? f.y + r * s.out + c : nullptr;
      vf c0[NV] = {}, c1[NV] = {}, c2[NV] = {}, sum[NV] = {};
      if (y)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          const float* p = f.c12 + c + v * L;
          c0[v] = f.c0 ? load_n(f.c0 + c + v * L, n) : splat(1.0f), c1[v] = load_n(p, n), c2[v] = load_n(p + s.out, n);
        }
      for (int m = 0; m < rows; m++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          vf t = load_n(dy + m * s.out + v * L, n);
          if (y) t = t * c0[v] + load_n(y + m * s.out + v * L, n) * c1[v] + c2[v];
          store(g + m * ldg + c + v * L, t);
          if (f.dbias) sum[v] += t;
        }
      if (f.dbias)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          float* p = f.dbias + task * s.out + c + v * L;
          store_n(p, first ? sum[v] : sum[v] + load_n(p, n), n);
        }
    });
    for (int64_t j = 0; j < s.in; j += PANEL) {
      const int64_t width = s.in - j < PANEL ? s.in - j : PANEL;
      const int nv = (int)((width + L - 1) / L);
      gemm_panel(nv, rows, s.out, g, ldg, 1, f.packed + j / PANEL * s.out * PANEL, PANEL, a, PANEL, false);
      for (int v = 0; v < nv; v++) {
        const int64_t e = j + v * L;
        const int n = (int)(s.in - e < L ? s.in - e : L);
        vf scale = splat(1.0f), shift{}, mean{}, s1{}, s2{};
        if (BN) {
          scale = load_n(f.bn + kScale * s.in + e, n), shift = load_n(f.bn + kShift * s.in + e, n);
          mean = load_n(f.bn + kMean * s.in + e, n);
        }
        const T* x = f.x + r * s.in + e;
        const T* also = f.also ? f.also + r * s.in + e : nullptr;
        T* du = f.du + r * s.in + e;
        for (int m = 0; m < rows; m++) {
          __builtin_prefetch(x + m * s.in + (j + PANEL < s.in ? PANEL : 0));
          const vf t = load_n(x + m * s.in, n);
          vf value = t, slope, d = load(a + m * PANEL + v * L);
          if (BN || ACT != kIdentity) {
            activate_both<ACT>(BN ? t * scale + shift : t, value, slope);
            d *= slope;
          }
          if (BN) {
            s1 += d;
            s2 += d * (t - mean);
          }
          if (also) d += load_n(also + m * s.in, n);
          if (streaming)
            stream(du + m * s.in, d);
          else
            store_n(du + m * s.in, d, n);
          store(a + m * PANEL + v * L, value);
        }
        if (BN && sums) {
          if (!first) s1 += load_n(sums + e, n), s2 += load_n(sums + s.in + e, n);
          store_n(sums + e, s1, n);
          store_n(sums + s.in + e, s2, n);
        }
      }
      if (width == nv * L)
        gemm_panel(nv, s.out, rows, g, 1, ldg, a, PANEL, dw + j, s.in, !first);
      else
        add_narrow_dweight(s, g, ldg, rows, a, width, dw + j, first);
    }
  }
  stream_fence();
}

template <typename T>
void forward(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  by_prologue(s.act, f.bn, [&](auto act, auto bn) { forward_act<decltype(act)::value, decltype(bn)::value>(s, f, task, scratch); });
}

template <typename T>
void backward(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  by_prologue(s.act, f.bn, [&](auto act, auto bn) { backward_act<decltype(act)::value, decltype(bn)::value>(s, f, task, scratch); });
}

template <typename T>
constexpr pointwise_conv::Kernels<T> table{&forward<T>, &backward<T>};

}  // namespace nvae::NVAE_ISA::pw
