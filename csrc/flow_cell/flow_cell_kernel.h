// One half of a flow cell, image by image. The hidden channels come in blocks of one vector: for each block the hidden maps
// stay in cache, [pixel][L] with a border of zeros, and only sums over blocks (y, dz) are wider. The 3x3 convolution is a
// product of small matrices: the pixels under one row of its kernel, and their channels, lie side by side in a padded image.
#pragma once
#include "flow_cell/flow_cell.h"
#include "flow_cell/product.h"

namespace nvae::NVAE_ISA::flow {

using flow_cell::Shape;
using flow_cell::Weights;

constexpr int kBand = 4;  // rows whose weight gradients are summed before they join the total: shorter sums round less

// exp(min(u, 0)) = scale (1 + p), with p = expm1 of a remainder: no digits are lost near 0.
NVAE_ALWAYS void exp_parts(vf u, vf& scale, vf& p) {
  const vf x = vmax(vmin(u, 0.0f), -87.0f);
  const vf shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf c = splat(1.3882512e-3f);
  c = c * r + 8.366521e-3f;
  c = c * r + 4.16672e-2f;
  c = c * r + 1.6666543e-1f;
  c = c * r + 4.9999997e-1f;
  p = r + r * r * c;
  scale = (vf)(((vi)shifted << 23) + 0x3f800000);
}
NVAE_ALWAYS vf elu(vf u) {
  vf scale, p;
  exp_parts(u, scale, p);
  return select(u > 0.0f, u, scale * p + (scale - 1.0f));
}
NVAE_ALWAYS vf elu_both(vf u, vf& slope) {
  vf scale, p;
  exp_parts(u, scale, p);
  slope = select(u > 0.0f, splat(1.0f), scale + scale * p);
  return select(u > 0.0f, u, scale * p + (scale - 1.0f));
}

// The memory of a task. Borders are zero and stay so: the image's and da1's are 1 pixel wide, those of h1 and da2 2.
struct Memory {
  int nv;                             // vectors that hold z channels
  int64_t z_row, near_row, wide_row;  // floats of a row: of the image; of da1; of h1 and da2
  int64_t floats;
  float *image, *h1, *da2, *da1, *sum, *band, *line, *other;

  Memory(const Shape& s, float* scratch) {
    nv = (s.z + L - 1) / L;
    z_row = (s.w + 2) * (int64_t)s.z;
    near_row = (s.w + 2) * (int64_t)L;
    wide_row = (s.w + 4) * (int64_t)L;
    floats = 0;
    const auto take = [&](int64_t n) {
      float* p = scratch ? scratch + floats : nullptr;
      floats += (n + 15) / 16 * 16;
      return p;
    };
    image = take((s.h + 2) * z_row);
    h1 = take((s.h + 4) * wide_row);
    da2 = take((s.h + 4) * wide_row);
    da1 = take((s.h + 2) * near_row);
    sum = take((int64_t)s.h * s.w * nv * L);
    band = take((9 * (int64_t)s.z + 25) * L);
    line = take((int64_t)kBand * s.w * L);
    other = take((int64_t)s.w * L);
  }
};
inline int64_t scratch_floats(const Shape& s) { return Memory(s, nullptr).floats; }

inline void zero(float* p, int64_t n) { __builtin_memset(p, 0, sizeof(float) * n); }

inline void take_image(const Shape& s, const Memory& m, const float* z) {
  for (int h = 0; h < s.h; h++)
    __builtin_memcpy(m.image + (h + 1) * m.z_row + s.z, z + (int64_t)h * s.w * s.z, sizeof(float) * s.w * s.z);
  zero(m.sum, (int64_t)s.h * s.w * m.nv * L);
}

// line = row h of conv3x3(z)
inline void first_conv(const Shape& s, const Weights& wt, const Memory& m, int block, int h, float* line) {
  bool add = false;
  for (int r = 0; r < 3; r++) {
    const int first = wt.first[r], count = wt.last[r] - first;
    if (count <= 0 || h + r < 1 || h + r > s.h) continue;
    product(s.w, (int64_t)count * s.z, m.image + (h + r) * m.z_row + first * s.z, s.z, 1,
            wt.in + ((block * 3 + r) * 3 + first) * (int64_t)s.z * L, line, add);
    add = true;
  }
  if (!add) zero(line, (int64_t)s.w * L);
}

// Taps of the 5x5 kernel that one row sees inside the image.
struct Taps {
  int n, which[25];
  int64_t offset[25];
  bool live[25];
};

template <int N>
NVAE_ALWAYS void depthwise_columns(const Taps& taps, const float* k, const float* row, float* line) {
  vf a[N] = {};
  for (int t = 0; t < taps.n; t++) {
    const vf weight = load(k + taps.which[t] * L);
    const float* p = row + taps.offset[t];
    NVAE_UNROLL for (int i = 0; i < N; i++) a[i] += weight * load(p + i * L);
  }
  NVAE_UNROLL for (int i = 0; i < N; i++) store(line + i * L, a[i]);
}

// line = row h of depthwise5x5(h1)
inline void depthwise(const Shape& s, const Weights& wt, const Memory& m, const float* k, int h, float* line) {
  Taps taps;
  taps.n = 0;
  for (int t = 0; t < 25; t++) {
    const int row = h + t / 5;
    if (!wt.live[t] || row < 2 || row >= s.h + 2) continue;
    taps.which[taps.n] = t;
    taps.offset[taps.n++] = row * m.wide_row + t % 5 * L;
  }
  int w = 0;
  for (; w + P <= s.w; w += P) depthwise_columns<P>(taps, k, m.h1 + w * L, line + w * L);
  for (; w + P / 2 <= s.w; w += P / 2) depthwise_columns<P / 2>(taps, k, m.h1 + w * L, line + w * L);
  for (; w < s.w; w++) depthwise_columns<1>(taps, k, m.h1 + w * L, line + w * L);
}

inline void forward(const Shape& s, const Weights& wt, int64_t images, const float* z, float* y, float* scratch) {
  const Memory m(s, scratch);
  const int64_t width = (int64_t)s.w * L, zv = (int64_t)m.nv * L, pixels = (int64_t)s.h * s.w;
  zero(scratch, m.floats);
  for (; images; images--, z += pixels * s.z, y += pixels * s.z) {
    take_image(s, m, z);
    for (int block = 0; block * L < s.e; block++) {
      const int hidden = s.e - block * L < L ? s.e - block * L : L;
      for (int h = 0; h < s.h; h++) {
        first_conv(s, wt, m, block, h, m.line);
        float* row = m.h1 + (h + 2) * m.wide_row + 2 * L;
        for (int64_t i = 0; i < width; i += L) store(row + i, elu(load(m.line + i)));
      }
      for (int h = 0; h < s.h; h++) {
        depthwise(s, wt, m, wt.dw + block * 25 * L, h, m.line);
        for (int64_t i = 0; i < width; i += L) store(m.line + i, elu(elu(load(m.line + i))));
        add_product(m.nv, s.w, hidden, m.line, L, wt.out_fwd + block * L * zv, m.sum + h * s.w * zv);
      }
    }
    for (int64_t i = 0; i < pixels; i++)
      for (int c = 0; c < s.z; c++) y[i * s.z + c] = z[i * s.z + c] - (m.sum[i * zv + c] + wt.bias[c]);
  }
}

// From N columns of g = da2: line = the gradient of h1; dk[kh][kw] += h1[w] g[h + 2 - kh][w + 2 - kw], for every tap.
template <int N>
NVAE_ALWAYS void depthwise_columns_back(const Taps& taps, const float* k, const float* g, const float* h1, float* dk,
                                        float* line) {
  vf a[N], d[N] = {};
  NVAE_UNROLL for (int i = 0; i < N; i++) a[i] = load(h1 + i * L);
  for (int t = 0; t < taps.n; t++) {
    const float* p = g + taps.offset[t];
    const int64_t at = taps.which[t] * L;
    vf e = load(dk + at);
    if (taps.live[t]) {
      const vf weight = load(k + at);
      NVAE_UNROLL for (int i = 0; i < N; i++) {
        const vf v = load(p + i * L);
        d[i] += weight * v;
        e += a[i] * v;
      }
    } else {
      NVAE_UNROLL for (int i = 0; i < N; i++) e += a[i] * load(p + i * L);
    }
    store(dk + at, e);
  }
  NVAE_UNROLL for (int i = 0; i < N; i++) store(line + i * L, d[i]);
}

inline void depthwise_back(const Shape& s, const Weights& wt, const Memory& m, const float* k, int h, float* dk, float* line) {
  Taps taps;
  taps.n = 0;
  for (int t = 0; t < 25; t++) {
    const int row = h + 4 - t / 5;
    if (row < 2 || row >= s.h + 2) continue;
    taps.which[taps.n] = t;
    taps.live[taps.n] = wt.live[t];
    taps.offset[taps.n++] = row * m.wide_row + (4 - t % 5) * L;
  }
  constexpr int N = L == 16 ? P : P / 2;
  const float* h1 = m.h1 + (h + 2) * m.wide_row + 2 * L;
  int w = 0;
  for (; w + N <= s.w; w += N) depthwise_columns_back<N>(taps, k, m.da2 + w * L, h1 + w * L, dk, line + w * L);
  for (; w + N / 2 <= s.w; w += N / 2) depthwise_columns_back<N / 2>(taps, k, m.da2 + w * L, h1 + w * L, dk, line + w * L);
  for (; w < s.w; w++) depthwise_columns_back<1>(taps, k, m.da2 + w * L, h1 + w * L, dk, line + w * L);
}

inline void add_to(float* total, const float* band, int64_t rows) {
  for (int64_t i = 0; i < rows * L; i += L) store(total + i, load(total + i) + load(band + i));
}

// One block of hidden channels of one image: adds to m.sum (dz) and to d_in, d_dw, d_out (minus the gradient of w_out).
inline void backward_block(const Shape& s, const Weights& wt, const Memory& m, int block, const float* dy, float* d_in,
                           float* d_dw, float* d_out) {
  const int64_t width = (int64_t)s.w * L, zv = (int64_t)m.nv * L, z = s.z;
  const float* k = wt.dw + block * 25 * L;
  for (int h = 0; h < s.h; h++) {  // h1, and its slope where da1 will be
    first_conv(s, wt, m, block, h, m.line);
    float *value = m.h1 + (h + 2) * m.wide_row + 2 * L, *slope = m.da1 + (h + 1) * m.near_row + L;
    for (int64_t i = 0; i < width; i += L) {
      vf d;
      store(value + i, elu_both(load(m.line + i), d));
      store(slope + i, d);
    }
  }
  for (int first = 0; first < s.h; first += kBand) {  // h2 and da2
    const int rows = s.h - first < kBand ? s.h - first : kBand;
    for (int h = first; h < first + rows; h++) {
      float *line = m.line + (h - first) * width, *da2 = m.da2 + (h + 2) * m.wide_row + 2 * L;
      depthwise(s, wt, m, k, h, line);
      product(s.w, z, dy + h * s.w * z, z, 1, wt.out + block * z * L, m.other, false);
      for (int64_t i = 0; i < width; i += L) {
        vf inner, outer;
        const vf value = elu_both(load(line + i), inner);
        store(line + i, elu_both(value, outer));
        store(da2 + i, -load(m.other + i) * inner * outer);
      }
    }
    product(z, (int64_t)rows * s.w, dy + first * s.w * z, 1, z, m.line, m.band, false);
    add_to(d_out, m.band, z);
  }
  for (int first = 0; first < s.h; first += kBand) {  // da1
    zero(m.band, 25 * L);
    for (int h = first; h < s.h && h < first + kBand; h++) {
      depthwise_back(s, wt, m, k, h, m.band, m.line);
      float* da1 = m.da1 + (h + 1) * m.near_row + L;
      for (int64_t i = 0; i < width; i += L) store(da1 + i, load(da1 + i) * load(m.line + i));
    }
    add_to(d_dw, m.band, 25);
  }
  for (int first = 0; first < s.h; first += kBand) {  // dw_in: a band in one sum, zeros of da1's border between rows
    const int rows = s.h - first < kBand ? s.h - first : kBand;
    for (int r = 0; r < 3; r++)
      product(3 * z, (int64_t)rows * (s.w + 2) - 2, m.image + (first + r) * m.z_row, 1, z, m.da1 + (first + 1) * m.near_row + L,
              m.band + 3 * r * z * L, false);
    add_to(d_in, m.band, 9 * z);
  }
  for (int h = 0; h < s.h; h++)  // dz
    for (int r = 0; r < 3; r++) {
      const int count = wt.last[r] - wt.first[r], left = 3 - wt.last[r];
      if (count <= 0 || h + 2 - r < 1 || h + 2 - r > s.h) continue;
      add_product(m.nv, s.w, (int64_t)count * L, m.da1 + (h + 2 - r) * m.near_row + left * L, L,
                  wt.in_back + ((block * 3 + r) * 3 + left) * L * zv, m.sum + h * s.w * zv);
    }
}

inline void backward(const Shape& s, const Weights& wt, int64_t images, const float* dy, const float* z, float* dz,
                     float* gradients, float* scratch) {
  const Memory m(s, scratch);
  const int64_t zv = (int64_t)m.nv * L, pixels = (int64_t)s.h * s.w, rows = flow_cell::gradient_rows(s) * L;
  const int blocks = (s.e + L - 1) / L;
  float* d_bias = gradients + blocks * rows;
  zero(scratch, m.floats);
  zero(gradients, blocks * rows + s.z);
  for (; images; images--, dy += pixels * s.z, z += pixels * s.z, dz += pixels * s.z) {
    take_image(s, m, z);
    for (int block = 0; block < blocks; block++) {
      float* d = gradients + block * rows;
      backward_block(s, wt, m, block, dy, d, d + 9 * s.z * L, d + (9 * s.z + 25) * L);
    }
    for (int64_t i = 0; i < pixels; i++)
      for (int c = 0; c < s.z; c++) {
        const float g = dy[i * s.z + c];
        dz[i * s.z + c] = g + m.sum[i * zv + c];
        d_bias[c] += g;
      }
  }
}

constexpr flow_cell::Kernels table{L, &scratch_floats, &forward, &backward};

}  // namespace nvae::NVAE_ISA::flow
