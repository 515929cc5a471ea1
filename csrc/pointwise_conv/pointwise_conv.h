// Arguments of the 1x1 kernels. Rows are pixels: x [m][in], y [m][out], dense. T is float or bfloat16, the rest float.
#pragma once
#include <cstdint>

namespace nvae::pointwise_conv {

constexpr int kRows = 128;  // rows of a tile, at most

struct Shape {
  int64_t m, in, out;
  int act;         // of the prologue
  int64_t pixels;  // rows of an image
  int64_t chunk;   // rows of a task: a function of the sizes alone
};

// y = act(u) W^T + bias + addend, u = scale x + shift as in `bn` [kCoefficients][in] (bn_act.h), or x where bn is null; bias
// [out] and addend [m][out] may be null. packed: W^T in panels.
// stats [3][out] of each task: pivot, sum(y - pivot), sum((y - pivot)^2). pixel_sums [images + tasks][out]: row image + task is
// the sum of y over the rows of that image in that task. Either may be null.
template <typename T>
struct Forward {
  const T* x;
  const float *bn, *packed, *bias;
  const T* addend;
  T* y;
  float *stats, *pixel_sums;
};

// From g = c0 dy + c1 y + c2 (c0 [out] or null: 1, c12 [2][out]: the backward of the BatchNorm behind; c12 null: g = dy): du, the
// gradient of u, plus `also` [m][in], null: nothing; sums [2][in] of each task: sum(du), sum(du (x - mean)), null: not wanted;
// dweight [out][in] and dbias [out] of each task, the latter null: not wanted. packed: W in panels.
template <typename T>
struct Backward {
  const T *dy, *y, *x, *also;
  const float *c0, *c12, *bn, *packed;
  T* du;
  float *sums, *dweight, *dbias;
};

template <typename T>
struct Kernels {
  void (*forward)(const Shape&, const Forward<T>&, int64_t task, float* scratch);
  void (*backward)(const Shape&, const Backward<T>&, int64_t task, float* scratch);
};

// Floats of scratch that a task of either kind needs, at most.
inline int64_t scratch_floats(const Shape& s) { return kRows * (s.in + s.out + 192); }

}  // namespace nvae::pointwise_conv
