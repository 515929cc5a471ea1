// What the CPU ops share between a torch tensor and a kernel's plain pointers. Only files that torch's headers may enter.
#pragma once
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>

#include "common/pool.h"

namespace nvae {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// f(task, scratch) for every task, by whichever thread is free: another program may hold one up. scratch is 64-byte aligned. Little
// work stays on this thread.
template <typename F>
void for_each_task(int64_t tasks, int64_t scratch_floats, int64_t work, const F& f) {
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t, int64_t) {
    const size_t bytes = (scratch_floats * sizeof(float) + 127) / 64 * 64;
    const std::unique_ptr<float, decltype(&std::free)> scratch(static_cast<float*>(std::aligned_alloc(64, bytes)), &std::free);
    TORCH_CHECK(scratch, "nvae_fast: no memory for ", bytes, " bytes of scratch");
    for (int64_t i = next++; i < tasks; i = next++) f(i, scratch.get());
  };
  constexpr int64_t kSerial = 1 << 19;  // multiply-adds that cost less than waking a thread
  if (work < kSerial)
    run(0, tasks);
  else
    at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, run);
}

inline void check_storage(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16), op, ": ", name, " is ",
              t.scalar_type(), " on ", t.device(), "; the native code takes float32 or bfloat16 on the CPU");
}

// Images, [N, C, H, W] of a storage type, as the kernels read them: dense and channels-last.
inline Tensor image(const char* op, const char* name, const Tensor& t) {
  check_storage(op, name, t);
  TORCH_CHECK(t.dim() == 4, op, ": ", name, " has shape ", t.sizes(), "; expected [N, C, H, W]");
  return t.contiguous(at::MemoryFormat::ChannelsLast);
}
// The same for an image that must have the sizes and type of another one.
inline Tensor image_like(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type, op, ": ", name, " has shape ", t.sizes(), " and type ", t.scalar_type(),
              "; expected ", sizes, " and ", type);
  return image(op, name, t);
}
inline Tensor empty_image(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  const auto& context = at::globalContext();
  const bool fill = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (fill || n * c * h * w * like.element_size() < kPooledBytes)
    return at::empty({n, c, h, w}, like.options(), at::MemoryFormat::ChannelsLast);
  return at::detail::empty_generic({n, c, h, w}, &pool(), c10::DispatchKeySet(c10::DispatchKey::CPU), like.scalar_type(),
                                   at::MemoryFormat::ChannelsLast);
}

// Float tables [rows, channels], such as coefficients of a BatchNorm.
inline Tensor floats(const char* op, const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == at::kFloat && t.sizes() == sizes, op, ": ", name, " has shape ", t.sizes(),
              " and type ", t.scalar_type(), "; expected float32 ", sizes);
  return t.contiguous();
}
inline OptionalTensor floats(const char* op, const char* name, const OptionalTensor& t, at::IntArrayRef sizes) {
  return t ? OptionalTensor(floats(op, name, *t, sizes)) : OptionalTensor();
}
inline const float* pointer(const Tensor& t) { return t.const_data_ptr<float>(); }
inline const float* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// f(T*): the type that stands for the storage of t, float or the bits of bfloat16.
template <typename F>
void by_storage(const Tensor& t, const F& f) {
  if (t.scalar_type() == at::kFloat)
    f(static_cast<float*>(nullptr));
  else
    f(static_cast<uint16_t*>(nullptr));
}
template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// A task's rows: `wanted` tasks at most, of at least `least` rows, in multiples of 16. A function of the sizes alone.
inline int64_t chunk_rows(int64_t rows, int64_t least, int64_t wanted) {
  const int64_t chunk = std::max(least, (rows + wanted - 1) / wanted);
  return (chunk + 15) / 16 * 16;
}

}  // namespace nvae
