// The CUDA that the kernels use, on one CPU thread: every CUDA thread is a fiber that runs until the next point where it has to wait
// for its warp or its block. What a GPU leaves open is made strict: all lanes of a warp must come to the same warp-wide operation,
// all warps to the same barrier; shared memory is NaN when a block starts; and what runs in which order, between barriers, can be
// reversed (`reversed`), so that a missing barrier or an unordered sum changes the result.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
  alignas(16) uint32_t x;
  uint32_t y, z, w;
};
struct float4 {
  alignas(16) float x;
  float y, z, w;
};
struct float2 {
  alignas(8) float x;
  float y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

constexpr size_t kShared = 99 * 1024, kStack = 256 * 1024;  // shared memory of compute capabilities 8.6 and 8.9, the least
enum Wait { kReady, kWarp, kBlock, kDone };
struct Fiber {
  ucontext_t context;  // in which it starts
  jmp_buf place;       // from which it goes on
  Wait wait;
  int operations;  // warp-wide ones and barriers so far
  int votes;       // of them __syncthreads_or
};

inline bool reversed = false;
inline std::map<const void*, size_t> shared_limit;  // of a kernel, as cudaFuncSetAttribute left it
inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<uint32_t> exchange[2];  // words of each thread in even and in odd operations
inline bool any_of[3];
inline int current;
inline ucontext_t scheduler;
inline jmp_buf scheduler_place;
inline const std::function<void()>* body;
inline dim3 thread_index, block_index, grid_size;
inline int launches;  // so far
inline std::map<unsigned*, int> rounds;  // of the launch: how often atomicInc has taken a counter back to 0

// A fiber is entered once by swapcontext, which asks the kernel for the signal mask, and from then on by longjmp, which does not.
// The address sanitizer follows the first alone.
#if defined(__SANITIZE_ADDRESS__)
inline void leave(Fiber& f) { swapcontext(&f.context, &scheduler); }
inline void resume(Fiber& f) { swapcontext(&scheduler, &f.context); }
#else
inline void leave(Fiber& f) {
  if (!_setjmp(f.place)) _longjmp(scheduler_place, 1);
}
inline void resume(Fiber& f) {
  if (_setjmp(scheduler_place)) return;
  if (f.operations) _longjmp(f.place, 1);
  swapcontext(&scheduler, &f.context);
}
#endif

inline void wait(Wait kind) {
  Fiber& me = fibers[current];
  me.wait = kind;
  me.operations++;
  leave(me);
}
inline void enter() {
  (*body)();
  wait(kDone);
}

constexpr int kWords = 4;  // that a lane can hand over at once
// all[lane][i]: what the lanes of the warp have in mine[i].
template <int N>
void gather(const uint32_t (&mine)[N], uint32_t (&all)[32][N]) {
  static_assert(N <= kWords);
  auto& buffer = exchange[fibers[current].operations % 2];
  std::copy(mine, mine + N, &buffer[current * kWords]);
  wait(kWarp);
  const int first = current / 32 * 32;
  for (int lane = 0; lane < 32; lane++) std::copy_n(&buffer[(first + lane) * kWords], N, all[lane]);
}

inline void run_fiber(int i) {
  current = i;
  thread_index = dim3(i);
  resume(fibers[i]);
}
// Runs a warp to the next barrier; false where its lanes part.
inline bool run_warp(int first) {
  while (true) {
    for (int i = 0; i < 32; i++) {
      const int at = first + (reversed ? 31 - i : i);
      if (fibers[at].wait != kDone) run_fiber(at);
    }
    for (int i = 1; i < 32; i++)
      if (fibers[first].wait != fibers[first + i].wait || fibers[first].operations != fibers[first + i].operations) return false;
    if (fibers[first].wait != kWarp) return true;
  }
}
inline bool run_block(int threads) {
  while (true) {
    for (int w = 0; w < threads; w += 32)
      if (!run_warp(reversed ? threads - 32 - w : w)) return std::fprintf(stderr, "the lanes of a warp part\n"), false;
    const int done = std::count_if(fibers.begin(), fibers.begin() + threads, [](const Fiber& f) { return f.wait == kDone; });
    if (done == threads) return true;
    if (done) return std::fprintf(stderr, "a warp ends while others wait at a barrier\n"), false;
  }
}

inline cudaError_t run_grid(dim3 grid, unsigned threads, size_t bytes, unsigned char* shared, const std::function<void()>& kernel) {
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024 || threads % 32)
    return cudaErrorInvalidConfiguration;
  while (stacks.size() < threads) stacks.push_back(std::make_unique<char[]>(kStack));
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  for (auto& words : exchange) words.assign(threads * kWords, 0);
  launches++;
  grid_size = grid;
  rounds.clear();
  body = &kernel;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  bool fine = true;
  for (uint64_t b = 0; b < blocks && fine; b++) {
    const uint64_t at = reversed ? blocks - 1 - b : b;
    block_index = dim3(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
    std::memset(shared, 0xff, bytes);
    any_of[0] = false;
    ASAN_POISON_MEMORY_REGION(shared + bytes, kShared - bytes);
    for (unsigned i = 0; i < threads; i++) {
      Fiber& f = fibers[i];
      f.wait = kReady, f.operations = f.votes = 0;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stacks[i].get(), f.context.uc_stack.ss_size = kStack, f.context.uc_link = &scheduler;
      makecontext(&f.context, enter, 0);
    }
    fine = run_block(threads);
    ASAN_UNPOISON_MEMORY_REGION(shared, kShared);
  }
  for (const auto& [counter, count] : rounds)  // blocks that run one after the other would end in the right result all the same
    if (count != 1) fine = false, std::fprintf(stderr, "more than one block is the last of its kind\n");
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const dim3& gridDim = emulator::grid_size;
namespace nvae::depthwise_conv::cuda {
alignas(128) inline unsigned char shared[emulator::kShared];
}
template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > emulator::kShared) return cudaErrorInvalidValue;
  emulator::shared_limit[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  size_t& limit = emulator::shared_limit[reinterpret_cast<const void*>(kernel)];
  limit = std::max<size_t>(limit, 48 * 1024);
  if (config->dynamicSmemBytes > limit) return cudaErrorInvalidValue;
  const std::tuple<P...> given(static_cast<P>(arguments)...);
  return emulator::run_grid(config->gridDim, config->blockDim.x, config->dynamicSmemBytes, nvae::depthwise_conv::cuda::shared,
                            [&] { std::apply(kernel, given); });
}

inline void __syncthreads() { emulator::wait(emulator::kBlock); }
inline int __syncthreads_or(int value) {
  const int n = emulator::fibers[emulator::current].votes++;  // the same in all warps, unlike the operations
  emulator::any_of[(n + 1) % 3] = false;
  emulator::any_of[n % 3] |= value != 0;
  emulator::wait(emulator::kBlock);
  return emulator::any_of[n % 3];
}
inline void __syncwarp() { emulator::wait(emulator::kWarp); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  static_assert(sizeof(T) == 4);
  uint32_t mine[1], all[32][1];
  std::memcpy(mine, &value, 4);
  emulator::gather(mine, all);
  std::memcpy(&value, all[from], 4);
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, (emulator::current & 31) ^ bits);
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* p, unsigned most) {  // blocks run one after the other
  const unsigned old = *p;
  *p = old >= most ? 0 : old + 1;
  if (old >= most) emulator::rounds[p]++;
  return old;
}
inline size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<const unsigned char*>(p) - nvae::depthwise_conv::cuda::shared;
}
inline float __uint_as_float(uint32_t u) { return __builtin_bit_cast(float, u); }
inline uint32_t __float_as_uint(float f) { return __builtin_bit_cast(uint32_t, f); }
inline float __expf(float x) { return std::exp(x); }
// Documented: 0 for a divisor above 2^126.
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f && std::isfinite(b) ? 0.0f * a : a / b; }
