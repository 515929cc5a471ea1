// The launches of one storage type, and how what the blocks found is joined. depthwise_cuda_<type>.cu instantiates it.
#pragma once
#include <algorithm>

#include "depthwise_conv/depthwise_cuda_any.cuh"
#include "depthwise_conv/depthwise_cuda_core.cuh"
#include "depthwise_conv/depthwise_cuda_plan.h"
#include "depthwise_conv/depthwise_cuda_tensor.cuh"

namespace nvae::depthwise_conv::cuda {

constexpr int kJoinThreads = 256;

// f(part): the sum over a block's parts in double. Warp w adds every eighth part from w on, then the warps are added in their order;
// what comes back is right in warp 0.
template <typename F>
__device__ __forceinline__ double over_parts(int parts, const F& f) {
  extern __shared__ __align__(128) unsigned char shared[];
  double* sums = reinterpret_cast<double*>(shared);
  double sum = 0.0;
#pragma unroll 4
  for (int i = threadIdx.x >> 5; i < parts; i += kJoinThreads / 32) sum += f(i);
  __syncthreads();
  sums[threadIdx.x] = sum;
  __syncthreads();
  sum = 0.0;
  for (int i = threadIdx.x & 31; i < kJoinThreads; i += 32) sum += sums[i];
  return sum;
}

// stats [2][c] from parts [.][3][c] = count, mean, squares (Chan et al. 1983).
static __global__ __launch_bounds__(kJoinThreads) void join_moments(const float* parts, int count, int64_t c, double values, float* stats) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + (threadIdx.x & 31);
  const float* mine = parts + (channel < c ? channel : 0);
  const double mean = over_parts(count, [&](int i) { return static_cast<double>(mine[3 * i * c]) * mine[(3 * i + 1) * c]; }) / values;
  const double var = over_parts(count, [&](int i) {
    const double d = mine[(3 * i + 1) * c] - mean;
    return mine[(3 * i + 2) * c] + d * d * mine[3 * i * c];
  }) / values;
  if (threadIdx.x >= 32 || channel >= c) return;
  stats[channel] = static_cast<float>(mean);
  stats[c + channel] = static_cast<float>(var < 0.0 ? 0.0 : var);  // NaN stays
}

// dweight [c][taps] and sums [2][c] (or null) from parts [.][taps + 2][c]; blockIdx.y is the row.
template <typename T>
__global__ __launch_bounds__(kJoinThreads) void join_gradients(const float* parts, int count, int taps, int64_t c, T* dweight,
                                                               float* sums) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + (threadIdx.x & 31);
  const int row = blockIdx.y;
  const float* mine = parts + row * c + (channel < c ? channel : 0);
  const double sum = over_parts(count, [&](int i) { return static_cast<double>(mine[i * (taps + 2) * c]); });
  if (threadIdx.x >= 32 || channel >= c) return;
  if (row < taps)
    narrow(static_cast<float>(sum), dweight[channel * taps + row]);
  else
    sums[(row - taps) * c + channel] = static_cast<float>(sum);
}

template <typename... P, typename... A>
cudaError_t start(void (*kernel)(P...), dim3 grid, int threads, int shared, cudaStream_t stream, A... arguments) {
  if (shared > 48 * 1024)
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

template <typename T, int V>
cudaError_t any_forwards(const Problem& p, const Forward& f, const Split& s, cudaStream_t stream) {
  const int taps = p.kernel * p.kernel * 32 * V * static_cast<int>(sizeof(T)), join = kAnyThreads * (1 + 2 * V) * 4;
  return start(any_forward<T, V>, dim3(blocks_of(p, 32 * V), s.parts), kAnyThreads, std::max(taps, join), stream, p, f, s);
}
template <typename T, int V>
cudaError_t any_backwards(const Problem& p, const Backward& f, const Split& s, cudaStream_t stream) {
  const int count = p.kernel * p.kernel, taps = count * 32 * V * static_cast<int>(sizeof(T));
  const dim3 grid(blocks_of(p, 32 * V), s.parts), deep(grid.x, grid.y, (count + kAnyTaps - 1) / kAnyTaps);
  const int bytes = std::max(taps, kAnyThreads * 2 * V * 4);
  if (const cudaError_t error = start(any_input_gradient<T, V>, grid, kAnyThreads, bytes, stream, p, f, s)) return error;
  return start(any_weight_gradient<T, V>, deep, kAnyThreads, kAnyThreads * kAnyTaps * V * 4, stream, p, f, s);
}

template <typename T, int K, int TILE>
cudaError_t core_forwards(const Problem& p, const Forward& f, const Split& s, cudaStream_t stream) {
  const dim3 grid(blocks_of(p, kChannels<T>), s.parts);
  return start(core_forward<T, K, TILE>, grid, kCoreThreads, tile_bytes(TILE + K - 1), stream, p, f, s);
}
template <typename T, int K, int TILE>
cudaError_t core_backwards(const Problem& p, const Backward& f, const Split& s, cudaStream_t stream) {
  const dim3 grid(blocks_of(p, kChannels<T>), s.parts);
  const int shared = tile_bytes(TILE + K - 1) + (K * K + 3) * 32 * kWord<T> * 4;
  return start(core_backward<T, K, TILE>, grid, kCoreThreads, shared, stream, p, f, s);
}

template <typename T>
cudaError_t forward_of(const Problem& p, const Forward& f, const Plan& plan, cudaStream_t stream) {
  const Split& s = plan.split;
  cudaError_t error = cudaErrorInvalidValue;
  if (plan.variant == kAny)
    error = plan.word == kWord<T> ? any_forwards<T, kWord<T>>(p, f, s, stream) : any_forwards<T, 1>(p, f, s, stream);
  if (plan.variant == kCore && p.kernel == 5)
    error = plan.tile == 16 ? core_forwards<T, 5, 16>(p, f, s, stream) : core_forwards<T, 5, 8>(p, f, s, stream);
  if (plan.variant == kCore && p.kernel == 3)
    error = plan.tile == 16 ? core_forwards<T, 3, 16>(p, f, s, stream) : core_forwards<T, 3, 8>(p, f, s, stream);
  if constexpr (sizeof(T) == 2)
    if (plan.variant == kTensor) {
      const dim3 grid(blocks_of(p, kChannels<T>), s.parts);
      error = start(tensor_forward<T>, grid, kTensorThreads, tile_bytes(kTensorSide), stream, p, f, s);
    }
  if (error != cudaSuccess || f.stats == nullptr) return error;
  const double values = static_cast<double>(p.n) * p.out_h * p.out_w;
  return start(join_moments, dim3(blocks_of(p, 32)), kJoinThreads, kJoinThreads * 8, stream, f.scratch, s.parts, p.c, values, f.stats);
}

template <typename T>
cudaError_t backward_of(const Problem& p, const Backward& f, const Plan& plan, cudaStream_t stream) {
  const Split& s = plan.split;
  cudaError_t error = cudaErrorInvalidValue;
  if (plan.variant == kAny)
    error = plan.word == kWord<T> ? any_backwards<T, kWord<T>>(p, f, s, stream) : any_backwards<T, 1>(p, f, s, stream);
  if (plan.variant == kCore && p.kernel == 5)
    error = plan.tile == 16 ? core_backwards<T, 5, 16>(p, f, s, stream) : core_backwards<T, 5, 8>(p, f, s, stream);
  if (plan.variant == kCore && p.kernel == 3)
    error = plan.tile == 16 ? core_backwards<T, 3, 16>(p, f, s, stream) : core_backwards<T, 3, 8>(p, f, s, stream);
  if (error != cudaSuccess) return error;
  const int taps = p.kernel * p.kernel;
  return start(join_gradients<T>, dim3(blocks_of(p, 32), taps + (f.sums ? 2 : 0)), kJoinThreads, kJoinThreads * 8, stream, f.scratch, s.parts, taps,
               p.c, static_cast<T*>(f.dweight), f.sums);
}

}  // namespace nvae::depthwise_conv::cuda
