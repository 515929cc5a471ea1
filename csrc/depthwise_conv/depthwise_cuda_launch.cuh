// The launches of one storage type. depthwise_cuda_<type>.cu instantiates it.
#pragma once
#include <algorithm>

#include "depthwise_conv/depthwise_cuda_any.cuh"
#include "depthwise_conv/depthwise_cuda_core.cuh"
#include "depthwise_conv/depthwise_cuda_plan.h"
#include "depthwise_conv/depthwise_cuda_tensor_backward.cuh"

namespace nvae::depthwise_conv::cuda {

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
  const int taps = p.kernel * p.kernel * 32 * V * static_cast<int>(sizeof(T)), join = kAnyThreads * std::max((1 + 2 * V) * 4, 16);
  return start(any_forward<T, V>, dim3(blocks_of(p, 32 * V), s.parts), kAnyThreads, std::max(taps, join), stream, p, f, s);
}
template <typename T, int V>
cudaError_t any_backwards(const Problem& p, const Backward& f, const Split& s, cudaStream_t stream) {
  const int count = p.kernel * p.kernel, taps = count * 32 * V * static_cast<int>(sizeof(T));
  const dim3 grid(blocks_of(p, 32 * V), s.parts, 1 + (count + kAnyTaps - 1) / kAnyTaps);
  const int bytes = std::max(taps, kAnyThreads * kAnyTaps * V * 4);
  return start(any_backward<T, V>, grid, kAnyThreads, bytes, stream, p, f, s);
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
  return error;
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
  if constexpr (sizeof(T) == 2)
    if (plan.variant == kTensor) {
      const dim3 grid(blocks_of(p, kChannels<T>), s.parts);
      error = start(tensor_backward<T>, grid, kTensorThreads, kTensorBackwardBytes, stream, p, f, s);
    }
  return error;
}

}  // namespace nvae::depthwise_conv::cuda
