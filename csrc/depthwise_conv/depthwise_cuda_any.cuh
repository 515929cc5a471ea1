// Kernels for every size: any odd kernel, stride, dilation, up-sampling and number of channels, straight from global memory, which
// the first-level cache helps. A warp takes one pixel at a time, a lane V channels.
#pragma once
#include "depthwise_conv/depthwise_cuda_join.cuh"

namespace nvae::depthwise_conv::cuda {

constexpr int kAnyThreads = 256, kAnyTaps = 8;  // taps of the weight gradient that a block sums

// The pixels of a block, one warp at a time: f(pixel index, image, y, x) of images [h][w].
template <typename F>
__device__ __forceinline__ void each_pixel(const Split& split, int h, int w, const F& f) {
  const unsigned begin = blockIdx.y * split.per, end = min(begin + split.per, static_cast<unsigned>(split.items));
  unsigned i = begin + (threadIdx.x >> 5), row = i / w, image = row / h;
  int x = i - row * w, y = row - image * h;
  for (; i < end; i += kAnyThreads / 32) {
    f(static_cast<int64_t>(i), static_cast<int64_t>(image), y, x);
    for (x += kAnyThreads / 32; x >= w; x -= w)
      if (++y == h) y = 0, image++;
  }
}

// The taps of the block's channels, [kernel^2][32 V], into shared memory.
template <typename T, int V>
__device__ __forceinline__ T* load_taps(const Problem& p, const void* weight) {
  extern __shared__ __align__(128) unsigned char shared[];
  T* taps = reinterpret_cast<T*>(shared);
  const int count = p.kernel * p.kernel;
  const int64_t c0 = static_cast<int64_t>(blockIdx.x) * 32 * V;
  for (int i = threadIdx.x; i < count * 32 * V; i += kAnyThreads) {
    const int64_t channel = c0 + i % (32 * V);
    if (channel < p.c)
      taps[i] = static_cast<const T*>(weight)[channel * count + i / (32 * V)];
    else
      narrow(0.0f, taps[i]);
  }
  __syncthreads();
  return taps;
}

// Coefficients of u for a lane's channels.
template <typename T, int V>
struct Affine {
  float scale[V], shift[V], mean[V];
  int act;
  __device__ __forceinline__ Affine(const Problem& p, const float* bn, int64_t at) : act(p.act) {
    table_row(bn, bn_act::kScale, p.c, at, 1.0f, scale);
    table_row(bn, bn_act::kShift, p.c, at, 0.0f, shift);
    table_row(bn, bn_act::kMean, p.c, at, 0.0f, mean);
  }
  __device__ __forceinline__ void apply(float (&x)[V]) const {
#pragma unroll
    for (int j = 0; j < V; j++) x[j] = fmaf(x[j], scale[j], shift[j]);
  }
  __device__ __forceinline__ void activated(float (&x)[V]) const {
    apply(x);
#pragma unroll
    for (int j = 0; j < V; j++) x[j] *= scale_for<T>(act);
    activate_scaled<T>(x, act);
  }
};

template <typename T, int V>
__global__ __launch_bounds__(kAnyThreads, 2) void any_forward(Problem p, Forward f, Split split) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x & 31;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * V;
  const int pad = p.dilation * (p.kernel / 2), twice = p.up - 1;  // a shift: 1 where the image has every pixel 2 x 2 times
  const bool lane_on = channel < p.c;
  const T* taps = load_taps<T, V>(p, f.weight) + lane * V;
  const Affine<T, V> affine(p, f.bn, lane_on ? channel : 0);
  const T* images = static_cast<const T*>(f.x) + (lane_on ? channel : 0);
  const int h = p.h << twice, w = p.w << twice;
  Moments<V> moments;
  each_pixel(split, p.out_h, p.out_w, [&](int64_t i, int64_t image, int y, int x) {
    float acc[V] = {};
    for (int m = 0; m < p.kernel; m++) {
      const int iy = y * p.stride + m * p.dilation - pad;
      if (iy < 0 || iy >= h) continue;
      const T* row = images + (image * p.h + (iy >> twice)) * p.w * p.c;
      for (int n = 0; n < p.kernel; n++) {
        const int ix = x * p.stride + n * p.dilation - pad;
        if (ix < 0 || ix >= w) continue;
        float u[V], k[V];
        load(row + (ix >> twice) * p.c, u);
        load(taps + (m * p.kernel + n) * 32 * V, k);
        affine.activated(u);
#pragma unroll
        for (int j = 0; j < V; j++) acc[j] = fmaf(u[j], k[j], acc[j]);
      }
    }
    if (!lane_on) return;
    store(static_cast<T*>(f.y) + i * p.c + channel, acc);
    moments.add(acc, true);
    const int seen = static_cast<int>(moments.count += 1.0f);
    if (!(seen & (seen - 1))) moments.centre();  // after 1, 2, 4, ...
  });
  if (f.stats == nullptr) return;
  join_warps<V, kAnyThreads>(moments, reinterpret_cast<float*>(shared));
  if (threadIdx.x < 32) moments.write(part_of<32 * V>(f.scratch, split, 3, blockIdx.y), 32 * V, V * lane);
  join_moments<32 * V, kAnyThreads>(p, f, split, shared);
}

// g at row y of the grid of the image that was convolved: false where there is none (outside, or between two of a stride).
__device__ __forceinline__ bool behind(int y, int stride, int out, int& at) {
  at = stride == 1 ? y : y >> 1;
  return y >= 0 && (stride == 1 || !(y & 1)) && at < out;
}

template <typename T, int V>
struct Behind {  // c0 dy + c1 y + c2, or dy
  const T *dy, *y;
  float c[3][V];
  bool formed;
  __device__ __forceinline__ Behind(const Problem& p, const Backward& f, int64_t at) : formed(f.c != nullptr) {
    dy = static_cast<const T*>(f.dy) + at, y = static_cast<const T*>(f.y) + (formed ? at : 0);
#pragma unroll
    for (int i = 0; i < 3; i++) table_row(f.c, i, p.c, at, 0.0f, c[i]);
  }
  __device__ __forceinline__ void get(int64_t offset, float (&g)[V]) const {
    load(dy + offset, g);
    if (!formed) return;
    float other[V];
    load(y + offset, other);
#pragma unroll
    for (int j = 0; j < V; j++) g[j] = fmaf(g[j], c[0][j], fmaf(other[j], c[1][j], c[2][j]));
  }
};

// du, and of the block's part [kernel^2 + 2][32 V] the last two rows: sum(du), sum(du (x - mean)).
template <typename T, int V>
__device__ __forceinline__ void any_input_gradient(const Problem& p, const Backward& f, const Split& split) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * V;
  const int pad = p.dilation * (p.kernel / 2), twice = p.up - 1;  // a shift: 1 where the image has every pixel 2 x 2 times
  const bool lane_on = channel < p.c;
  const T* taps = load_taps<T, V>(p, f.weight) + lane * V;
  const Affine<T, V> affine(p, f.bn, lane_on ? channel : 0);
  const Behind<T, V> behind_y(p, f, lane_on ? channel : 0);
  float sums[2 * V] = {};
  each_pixel(split, p.h, p.w, [&](int64_t i, int64_t image, int y, int x) {
    float acc[V] = {};
    for (int copy = 0; copy < 1 << 2 * twice; copy++)  // the pixels of the image that this one stands for
      for (int m = 0; m < p.kernel; m++) {
        int oy, ox;
        if (!behind((y << twice) + (copy >> twice) + pad - m * p.dilation, p.stride, p.out_h, oy)) continue;
        const int64_t row = (image * p.out_h + oy) * p.out_w;
        for (int n = 0; n < p.kernel; n++) {
          if (!behind((x << twice) + (copy & twice) + pad - n * p.dilation, p.stride, p.out_w, ox)) continue;
          float g[V], k[V];
          behind_y.get((row + ox) * p.c, g);
          load(taps + (m * p.kernel + n) * 32 * V, k);
#pragma unroll
          for (int j = 0; j < V; j++) acc[j] = fmaf(g[j], k[j], acc[j]);
        }
      }
    if (!lane_on) return;
    float value[V], a[V], slope[V];
    load(static_cast<const T*>(f.x) + i * p.c + channel, value);
#pragma unroll
    for (int j = 0; j < V; j++) a[j] = value[j];
    affine.apply(a);
    activate_both<T>(a, slope, p.act);
#pragma unroll
    for (int j = 0; j < V; j++) acc[j] *= slope[j];
    store(static_cast<T*>(f.du) + i * p.c + channel, acc);
#pragma unroll
    for (int j = 0; j < V; j++) sums[j] += acc[j], sums[V + j] = fmaf(acc[j], value[j] - affine.mean[j], sums[V + j]);
  });
  __syncthreads();
  float* total = reinterpret_cast<float*>(shared);  // [warp][2 V][32]
#pragma unroll
  for (int j = 0; j < 2 * V; j++) total[(warp * 2 * V + j) * 32 + lane] = sums[j];
  __syncthreads();
  if (warp) return;
  const int count = p.kernel * p.kernel;
  float* part = part_of<32 * V>(f.scratch, split, count + 2, blockIdx.y) + count * 32 * V + lane * V;
#pragma unroll
  for (int j = 0; j < 2 * V; j++) {
    float sum = 0.0f;
    for (int other = 0; other < kAnyThreads / 32; other++) sum += total[(other * 2 * V + j) * 32 + lane];
    part[j / V * 32 * V + j % V] = sum;
  }
}

// Of the block's part [kernel^2 + 2][32 V] the rows from tap `first` on.
template <typename T, int V>
__device__ __forceinline__ void any_weight_gradient(const Problem& p, const Backward& f, const Split& split, int first) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, count = p.kernel * p.kernel;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * V;
  const int pad = p.dilation * (p.kernel / 2), twice = p.up - 1;  // a shift: 1 where the image has every pixel 2 x 2 times
  const bool lane_on = channel < p.c;
  const Affine<T, V> affine(p, f.bn, lane_on ? channel : 0);
  const Behind<T, V> behind_y(p, f, lane_on ? channel : 0);
  const T* images = static_cast<const T*>(f.x) + (lane_on ? channel : 0);
  int down[kAnyTaps], right[kAnyTaps];
  float dw[kAnyTaps][V] = {};
#pragma unroll
  for (int t = 0; t < kAnyTaps; t++) {
    down[t] = pad - (first + t) / p.kernel * p.dilation;
    right[t] = pad - (first + t) % p.kernel * p.dilation;
  }
  each_pixel(split, p.h, p.w, [&](int64_t i, int64_t image, int y, int x) {
    float a[V];
    load(images + i * p.c, a);
    affine.activated(a);
    for (int copy = 0; copy < 1 << 2 * twice; copy++)
#pragma unroll
      for (int t = 0; t < kAnyTaps; t++) {
        int oy, ox;
        if (first + t >= count || !behind((y << twice) + (copy >> twice) + down[t], p.stride, p.out_h, oy) ||
            !behind((x << twice) + (copy & twice) + right[t], p.stride, p.out_w, ox))
          continue;
        float g[V];
        behind_y.get(((image * p.out_h + oy) * p.out_w + ox) * p.c, g);
#pragma unroll
        for (int j = 0; j < V; j++) dw[t][j] = fmaf(a[j], g[j], dw[t][j]);
      }
  });
  float* total = reinterpret_cast<float*>(shared);  // [warp][taps][V][32]
#pragma unroll
  for (int t = 0; t < kAnyTaps; t++)
#pragma unroll
    for (int j = 0; j < V; j++) total[((warp * kAnyTaps + t) * V + j) * 32 + lane] = dw[t][j];
  __syncthreads();
  if (first + warp >= count) return;  // warp w adds up tap w
  float* part = part_of<32 * V>(f.scratch, split, count + 2, blockIdx.y) + (first + warp) * 32 * V + lane * V;
#pragma unroll
  for (int j = 0; j < V; j++) {
    float sum = 0.0f;
    for (int other = 0; other < kAnyThreads / 32; other++) sum += total[((other * kAnyTaps + warp) * V + j) * 32 + lane];
    part[j] = sum;
  }
}

// blockIdx.z: 0 takes the gradient of x, each further one that of kAnyTaps taps.
template <typename T, int V>
__global__ __launch_bounds__(kAnyThreads, 2) void any_backward(Problem p, Backward f, Split split) {
  extern __shared__ __align__(128) unsigned char shared[];
  if (blockIdx.z == 0)
    any_input_gradient<T, V>(p, f, split);
  else
    any_weight_gradient<T, V>(p, f, split, (blockIdx.z - 1) * kAnyTaps);
  join_gradients<T, 32 * V, kAnyThreads>(p, f, split, p.kernel * p.kernel, shared);
}

}  // namespace nvae::depthwise_conv::cuda
