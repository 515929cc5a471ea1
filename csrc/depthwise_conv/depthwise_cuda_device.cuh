// What the GPU kernels share: storage types, activations, running moments of a channel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "bn_act/bn_act.h"
#include "depthwise_conv/depthwise_cuda_instructions.cuh"
#include "depthwise_conv/depthwise_cuda_plan.h"

namespace nvae::depthwise_conv::cuda {

enum Activation { kIdentity, kSwish, kElu };

// A lane works on a word: 1 channel of float, 2 of a 16-bit type.
template <typename T>
constexpr int kWord = 4 / sizeof(T);

__device__ __forceinline__ void unpack(uint32_t word, float (&f)[1], float) { f[0] = __uint_as_float(word); }
__device__ __forceinline__ void unpack(uint32_t word, float (&f)[2], __nv_bfloat16) {
  f[0] = __uint_as_float(word << 16);
  f[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ void unpack(uint32_t word, float (&f)[2], __half) {
  const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
  f[0] = pair.x, f[1] = pair.y;
}
__device__ __forceinline__ uint32_t pack(const float (&f)[1], float) { return __float_as_uint(f[0]); }
__device__ __forceinline__ uint32_t pack(const float (&f)[2], __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(f[0], f[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(const float (&f)[2], __half) {
  const __half2 pair = __floats2half2_rn(f[0], f[1]);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& to) { to = __float2half_rn(x); }

// V channels at p; a word of them must be aligned to 4 bytes, a single one need not be.
template <int V, typename T>
__device__ __forceinline__ void load(const T* p, float (&f)[V]) {
  if constexpr (V == kWord<T>)
    unpack(*reinterpret_cast<const uint32_t*>(p), f, T());
  else
    f[0] = widen(*p);
}
// Stores f and makes it what a later load gives.
template <int V, typename T>
__device__ __forceinline__ void store(T* p, float (&f)[V]) {
  if constexpr (V == kWord<T>) {
    const uint32_t word = pack(f, T());
    *reinterpret_cast<uint32_t*>(p) = word;
    unpack(word, f, T());
  } else {
    narrow(f[0], *p);
    f[0] = widen(*p);
  }
}

// u sigmoid(u) of kSwishScale u: bfloat16 takes one instruction of the special-function unit, whose error lies below its rounding,
// the other types two.
template <typename T>
constexpr float kSwishScale = std::is_same_v<T, __nv_bfloat16> ? 0.5f : 1.0f;
template <typename T>
__device__ __forceinline__ float swish_of_scaled(float u) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return fmaf(u, tanh_approximate(u), u);
  else
    return __fdividef(u, 1.0f + __expf(-u));
}
__device__ __forceinline__ float elu(float u) { return u > 0.0f ? u : __expf(u) - 1.0f; }

// act(u), of kSwishScale u where it is Swish.
template <typename T, int N>
__device__ __forceinline__ void activate_scaled(float (&u)[N], int act) {
  if (act == kSwish) {
#pragma unroll
    for (int i = 0; i < N; i++) u[i] = swish_of_scaled<T>(u[i]);
  } else if (act == kElu) {
#pragma unroll
    for (int i = 0; i < N; i++) u[i] = elu(u[i]);
  }
}
template <typename T>
__device__ __forceinline__ float scale_for(int act) {
  return act == kSwish ? kSwishScale<T> : 1.0f;
}

// u becomes act(u), slope act'(u).
template <typename T, int N>
__device__ __forceinline__ void activate_both(float (&u)[N], float (&slope)[N], int act) {
#pragma unroll
  for (int i = 0; i < N; i++) slope[i] = 1.0f;
  if (act == kSwish) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const float h = 0.5f * u[i], t = tanh_approximate(h);
        u[i] = fmaf(h, t, h);
        slope[i] = fmaf(0.5f, fmaf(h, fmaf(-t, t, 1.0f), t), 0.5f);
      } else {
        const float s = __fdividef(1.0f, 1.0f + __expf(-u[i]));
        u[i] *= s;
        slope[i] = fmaf(u[i], 1.0f - s, s);
      }
    }
  } else if (act == kElu) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float e = __expf(u[i]);
      slope[i] = u[i] > 0.0f ? 1.0f : e;
      u[i] = u[i] > 0.0f ? u[i] : e - 1.0f;
    }
  }
}

// N values of row `row` of a float table [.][c], from channel `at` on, 16 bytes at a time where there are four; `other` without a table.
template <int N>
__device__ __forceinline__ void table_row(const float* table, int row, int64_t c, int64_t at, float other, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = other;
  if (table == nullptr) return;
  const float* p = table + row * c + at;
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 q = __ldg(reinterpret_cast<const float4*>(p + i));
      to[i] = q.x, to[i + 1] = q.y, to[i + 2] = q.z, to[i + 3] = q.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = __ldg(p + i);
  }
}

// Count, mean and sum of squares about it of what a lane has stored, as sums about a pivot. The pivot moves to the mean after the
// first few values, since one that lies several deviations off would have the square of that distance cancel in the variance.
template <int V>
struct Moments {
  float count = 0.0f, pivot[V] = {}, s1[V] = {}, s2[V] = {};

  __device__ __forceinline__ void add(const float (&value)[V], bool counts) {
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float d = counts ? value[j] - pivot[j] : 0.0f;
      s1[j] += d;
      s2[j] = fmaf(d, d, s2[j]);
    }
  }
  __device__ __forceinline__ void centre() {
    if (count == 0.0f) return;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float d = __fdividef(s1[j], count);
      s2[j] = fmaf(-d, s1[j], s2[j]);
      pivot[j] += d;
      s1[j] = 0.0f;
    }
  }
  // Chan et al. 1983; both centred.
  __device__ __forceinline__ void join(float others, const float (&mean)[V], const float (&squares)[V]) {
    const float total = count + others, share = others > 0.0f ? __fdividef(others, total) : 0.0f;
#pragma unroll
    for (int j = 0; j < V; j++) {
      const float d = mean[j] - pivot[j];
      if (others > 0.0f) pivot[j] += d * share, s2[j] += squares[j] + d * d * count * share;
    }
    count = total;
  }
  // To part [3][width]: count, mean, squares.
  __device__ __forceinline__ void write(float* part, int width, int at) const {
#pragma unroll
    for (int j = 0; j < V; j++) part[at + j] = count, part[width + at + j] = pivot[j], part[2 * width + at + j] = s2[j];
  }
};

// The moments of a lane's channels over the warps of the block, in their order, to the lanes of warp 0. Every thread comes here.
// scratch: (1 + 2 V) * threads floats of shared memory.
template <int V, int THREADS>
__device__ __forceinline__ void join_warps(Moments<V>& m, float* scratch) {
  float* mine = scratch + threadIdx.x * (1 + 2 * V);
  m.centre();
  __syncthreads();
  mine[0] = m.count;
#pragma unroll
  for (int j = 0; j < V; j++) mine[1 + j] = m.pivot[j], mine[1 + V + j] = m.s2[j];
  __syncthreads();
  if (threadIdx.x < 32)
    for (int other = 32; other < THREADS; other += 32) {
      const float* theirs = mine + other * (1 + 2 * V);
      float mean[V], squares[V];
#pragma unroll
      for (int j = 0; j < V; j++) mean[j] = theirs[1 + j], squares[j] = theirs[1 + V + j];
      m.join(theirs[0], mean, squares);
    }
}

}  // namespace nvae::depthwise_conv::cuda
