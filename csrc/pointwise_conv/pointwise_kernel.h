// 1x1 convolution as a product of tiles that stay in the second-level cache. The BatchNorm and activation before it are applied
// while a tile is read, the sums for the BatchNorm behind it are taken while a tile is written.
#pragma once
#include "common/activation.h"
#include "common/gemm.h"
#include "pointwise_conv/pointwise_conv.h"

namespace nvae::NVAE_ISA {
namespace pw {

using pointwise_conv::Backward;
using pointwise_conv::Forward;
using pointwise_conv::kRows;
using pointwise_conv::Shape;

constexpr int64_t kTile = 64 * 1024;  // floats of a tile that is read again and again: 256 KB

inline int64_t round_up(int64_t n, int64_t by) { return (n + by - 1) / by * by; }
// Row pitch of a tile: whole vectors, and not a power of two of cache lines.
inline int64_t pitch(int64_t n) { return round_up(n, L) + L; }
// Rows of a tile that is `width` wide.
inline int tile_rows(int64_t width) {
  int rows = kRows;
  while (rows > 2 * MR && rows * width > kTile) rows /= 2;
  return rows;
}

// tile[m][c] = act(x * scale + shift), or x; columns behind `width` are zero up to a whole vector.
template <int ACT, bool AFFINE, typename T>
void read_tile(const T* x, int64_t ldx, int rows, int64_t width, const float* scale, const float* shift, float* tile, int64_t ld) {
  for (int64_t c = 0; c < width; c += L) {
    const int n = (int)(width - c < L ? width - c : L);
    vf a = splat(1.0f), b{};
    if (AFFINE) a = load_n(scale + c, n), b = load_n(shift + c, n);
    if (n == L)
      for (int m = 0; m < rows; m++) {
        const vf v = load(x + m * ldx + c);
        store(tile + m * ld + c, AFFINE ? activate<ACT>(v * a + b) : v);
      }
    else
      for (int m = 0; m < rows; m++) {
        const vf v = load_n(x + m * ldx + c, n);
        store(tile + m * ld + c, AFFINE ? activate<ACT>(v * a + b) : v);
      }
  }
}

// stats: [pivot | sum | sum of squares], `stride` floats apart; `first` sets the pivot.
NVAE_ALWAYS void add_stats(const float* tile, int64_t ld, int rows, int n, float* stats, int64_t stride, bool first) {
  if (first) store_n(stats, load(tile), n), store_n(stats + stride, vf{}, n), store_n(stats + 2 * stride, vf{}, n);
  const vf p = load_n(stats, n);
  vf s1[2] = {}, s2[2] = {};
  int m = 0;
  for (; m + 2 <= rows; m += 2)
    NVAE_UNROLL for (int i = 0; i < 2; i++) {
      const vf e = load(tile + (m + i) * ld) - p;
      s1[i] += e;
      s2[i] += e * e;
    }
  for (; m < rows; m++) {
    const vf e = load(tile + m * ld) - p;
    s1[0] += e;
    s2[0] += e * e;
  }
  store_n(stats + stride, load_n(stats + stride, n) + s1[0] + s1[1], n);
  store_n(stats + 2 * stride, load_n(stats + 2 * stride, n) + s2[0] + s2[1], n);
}

template <typename T>
NVAE_ALWAYS void write_vector(T* p, vf v, int n, bool streaming) {
  if (n < L) return store_n(p, v, n);
  if (sizeof(T) == 4 && streaming) return stream(p, v);
  store(p, v);
}

template <typename T>
inline bool may_stream(const T* p, int64_t width, int64_t elements) {
  return sizeof(T) == 4 && width % L == 0 && (uintptr_t)p % (L * 4) == 0 && elements > (1 << 18);
}

// Scratch floats of a forward task.
inline int64_t forward_scratch(const Shape& s) {
  const int64_t k = s.in < 512 ? s.in : 512;
  return kRows * (pitch(k) + pitch(s.out > PANEL && s.in > 512 ? s.out : PANEL)) + 64;
}

template <int ACT, bool AFFINE, typename T>
void forward(const Shape& s, const Forward<T>& f, int64_t task, float* scratch) {
  const int64_t begin = task * s.chunk, end = begin + s.chunk < s.m ? begin + s.chunk : s.m;
  float* stats = f.stats ? f.stats + task * 3 * s.out : nullptr;
  const bool streaming = may_stream(f.y, s.out, s.m * s.out);
  constexpr int64_t KB = 512;  // columns of x at a time
  const bool whole = s.in <= KB;
  const int64_t ldx = pitch(whole ? s.in : KB), ldo = whole ? PANEL : pitch(s.out);
  const int tile = tile_rows(whole ? ldx : ldx + ldo);
  float *a = scratch, *o = scratch + tile * ldx;
  for (int64_t r = begin; r < end; r += tile) {
    const int rows = (int)(end - r < tile ? end - r : tile);
    for (int64_t k = 0; k < s.in; k += KB) {
      const int64_t depth = s.in - k < KB ? s.in - k : KB;
      read_tile<ACT, AFFINE>(f.x + r * s.in + k, s.in, rows, depth, f.scale + k, f.shift + k, a, ldx);
      const bool last = k + depth == s.in;
      for (int64_t j = 0; j < s.out; j += PANEL) {
        const int64_t width = s.out - j < PANEL ? s.out - j : PANEL;
        const int nv = (int)((width + L - 1) / L);
        float* c = whole ? o : o + j;
        gemm_panel(nv, rows, depth, a, ldx, 1, f.packed + (j / PANEL * s.in + k) * PANEL, PANEL, c, ldo, k > 0);
        if (!last) continue;
        for (int v = 0; v < nv; v++) {
          const int n = (int)(width - v * L < L ? width - v * L : L);
          T* y = f.y + r * s.out + j + v * L;
          for (int m = 0; m < rows; m++) write_vector(y + m * s.out, load(c + m * ldo + v * L), n, streaming);
          if (stats) add_stats(c + v * L, ldo, rows, n, stats + j + v * L, s.out, r == begin);
        }
      }
    }
  }
  stream_fence();
}

inline int64_t backward_scratch(const Shape& s) { return kRows * (pitch(s.out) + PANEL) + 64; }

template <int ACT, bool AFFINE, bool BN, typename T>
void backward(const Shape& s, const Backward<T>& f, int64_t task, float* scratch) {
  const int64_t begin = task * s.chunk, end = begin + s.chunk < s.m ? begin + s.chunk : s.m;
  const int64_t ldg = pitch(s.out);
  const int tile = tile_rows(ldg);
  float *g = scratch, *a = g + tile * ldg;
  float *sums = f.sums ? f.sums + task * 2 * s.in : nullptr, *dw = f.dweight + task * s.out * s.in;
  const bool streaming = may_stream(f.du, s.in, s.m * s.in);
  const int64_t ldw = s.in;
  for (int64_t r = begin; r < end; r += tile) {
    const int rows = (int)(end - r < tile ? end - r : tile);
    const bool first = r == begin;
    for (int64_t c = 0; c < s.out; c += L) {
      const int n = (int)(s.out - c < L ? s.out - c : L);
      const T *dy = f.dy + r * s.out + c, *y = BN ? f.y + r * s.out + c : nullptr;
      vf c0{}, c1{}, c2{};
      if (BN) c0 = load_n(f.c0 + c, n), c1 = load_n(f.c1 + c, n), c2 = load_n(f.c2 + c, n);
      for (int m = 0; m < rows; m++) {
        vf v = load_n(dy + m * s.out, n);
        if (BN) v = v * c0 + load_n(y + m * s.out, n) * c1 + c2;
        store(g + m * ldg + c, v);
      }
    }
    for (int64_t j = 0; j < s.in; j += PANEL) {
      const int64_t width = s.in - j < PANEL ? s.in - j : PANEL;
      const int nv = (int)((width + L - 1) / L);
      gemm_panel(nv, rows, s.out, g, ldg, 1, f.packed + j / PANEL * s.out * PANEL, PANEL, a, PANEL, false);
      for (int v = 0; v < nv; v++) {
        const int64_t e = j + v * L;
        const int n = (int)(s.in - e < L ? s.in - e : L);
        vf scale = splat(1.0f), shift{}, mean{}, s1{}, s2{};
        if (AFFINE) scale = load_n(f.scale + e, n), shift = load_n(f.shift + e, n), mean = load_n(f.mean + e, n);
        const T* x = f.x + r * s.in + e;
        T* du = f.du + r * s.in + e;
        for (int m = 0; m < rows; m++) {
          const vf t = load_n(x + m * s.in, n);
          vf value = t, slope, d = load(a + m * PANEL + v * L);
          if (AFFINE) {
            activate_both<ACT>(t * scale + shift, value, slope);
            d *= slope;
            s1 += d;
            s2 += d * (t - mean);
          }
          write_vector(du + m * s.in, d, n, streaming);
          store(a + m * PANEL + v * L, value);
        }
        if (AFFINE && sums) {
          if (!first) s1 += load_n(sums + e, n), s2 += load_n(sums + s.in + e, n);
          store_n(sums + e, s1, n);
          store_n(sums + s.in + e, s2, n);
        }
      }
      // dW panel [out][width] += g^T act(u); the rows of dW are `in` apart, so the last panel goes through a buffer
      if (width == nv * L) {
        gemm_panel(nv, s.out, rows, g, 1, ldg, a, PANEL, dw + j, ldw, !first);
      } else {
        float block[MR * PANEL];
        for (int64_t o = 0; o < s.out; o += MR) {
          const int64_t count = s.out - o < MR ? s.out - o : MR;
          gemm_panel(nv, count, rows, g + o, 1, ldg, a, PANEL, block, PANEL, false);
          for (int64_t i = 0; i < count; i++)
            for (int64_t c = 0; c < width; c++) {
              float* p = dw + (o + i) * ldw + j + c;
              *p = block[i * PANEL + c] + (first ? 0.0f : *p);
            }
        }
      }
    }
  }
  stream_fence();
}

}  // namespace pw
}  // namespace nvae::NVAE_ISA
