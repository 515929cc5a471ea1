// Arguments of the 1x1 kernels. Rows are pixels: x [m][in], y [m][out], dense. T is float or bfloat16, per-channel values float.
#pragma once
#include <cstdint>

namespace nvae::pointwise_conv {

constexpr int kRows = 128;  // rows of a tile, at most

struct Shape {
  int64_t m;
  int64_t in, out;
  int act;
  int64_t chunk;  // rows of a task: a function of the sizes alone, so that sums do not depend on the threads
};

// y = act(x * scale + shift) W^T; packed: W^T in panels (pack_panels).
// stats [chunks][3][out]: a pivot, sum(y - pivot), sum((y - pivot)^2) of each chunk; null: not wanted.
template <typename T>
struct Forward {
  const T* x;
  const float *scale, *shift, *packed;
  T* y;
  float* stats;
};

// From g = c0 * dy + c1 * y + c2 (c1 null: g = dy): du, the gradient of u = x * scale + shift (act null prologue: of x);
// sums [chunks][2][in]: sum(du), sum(du * (x - mean)); dweight [chunks][out][in], to be added over chunks. packed: W in panels.
template <typename T>
struct Backward {
  const T *dy, *y, *x;
  const float *scale, *shift, *mean, *packed, *c0, *c1, *c2;
  T* du;
  float *sums, *dweight;
};

struct Kernels {
  int panel;  // columns of a packed panel
  void (*forward_f32)(const Shape&, const Forward<float>&, int64_t task, float* scratch);
  void (*forward_bf16)(const Shape&, const Forward<uint16_t>&, int64_t task, float* scratch);
  void (*backward_f32)(const Shape&, const Backward<float>&, int64_t task, float* scratch);
  void (*backward_bf16)(const Shape&, const Backward<uint16_t>&, int64_t task, float* scratch);
};

}  // namespace nvae::pointwise_conv
