// Rows of strided tensors as float arrays: how a kernel that computes on contiguous floats reads and writes any layout.
#pragma once
#include <cstdint>

namespace nvae {

// One [h, w] plane of a tensor, numbered row by row.
template <typename T>
struct Plane {
  T* data;
  int64_t stride_h, stride_w, w;

  T& at(int64_t i) const { return data[i / w * stride_h + i % w * stride_w]; }
  bool flat() const { return stride_h == w * stride_w; }
};

// n elements from number `start`, as floats: in place where they are contiguous floats, else copied to `scratch`.
template <typename T>
const float* load(const Plane<const T>& plane, int64_t start, int64_t n, float* scratch) {
  if (plane.flat()) {
    const T* p = plane.data + start * plane.stride_w;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (plane.stride_w == 1) return p;
    }
    for (int64_t i = 0; i < n; i++) scratch[i] = static_cast<float>(p[i * plane.stride_w]);
  } else {
    for (int64_t i = 0; i < n; i++) scratch[i] = static_cast<float>(plane.at(start + i));
  }
  return scratch;
}

// Where a kernel may put n results from number `start`: in place, or `scratch`, which `store` then copies out.
template <typename T>
float* target(const Plane<T>& plane, int64_t start, float* scratch) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (plane.flat() && plane.stride_w == 1) return plane.data + start;
  }
  return scratch;
}

template <typename T>
void store(const Plane<T>& plane, int64_t start, int64_t n, const float* values) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (plane.flat() && plane.stride_w == 1) return;
  }
  if (plane.flat()) {
    T* p = plane.data + start * plane.stride_w;
    for (int64_t i = 0; i < n; i++) p[i * plane.stride_w] = static_cast<T>(values[i]);
  } else {
    for (int64_t i = 0; i < n; i++) plane.at(start + i) = static_cast<T>(values[i]);
  }
}

}  // namespace nvae
