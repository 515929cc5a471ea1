// Arguments of the BatchNorm kernels. Rows are pixels: x [rows][channels], dense. T is float or bfloat16, the rest float.
#pragma once
#include <cstdint>

namespace nvae::bn_act {

// Rows of `bn` [kCoefficients][channels]: what a normalisation is, u = scale x + shift = weight (x - mean) rstd + bias.
enum { kMean, kVar, kRstd, kScale, kShift, kCoefficients };

// Rows of the table of gradients [kGradients][channels]: sum(du), sum(du (x - mean)), the weight's, c of dx = c0 du + c1 x + c2, and
// the offset's: 0 behind statistics of the batch, which take it away.
enum { kTotal, kMoment, kDweight, kC0, kC1, kC2, kDoffset, kGradients };

struct Shape {
  int64_t rows, channels;
  int act;
  int64_t chunk;  // rows of a task: a function of the sizes alone
};

// Other gradients of x, like x: none, the first alone, or two.
template <typename T>
struct Also {
  const T *first, *second;
};

// Tasks of `chunk` rows; partial sums come per task.
template <typename T>
struct Kernels {
  // [3][channels]: pivot, sum(x - pivot), sum((x - pivot)^2)
  void (*stats)(const Shape&, const T* x, float* partial, int64_t task);
  // y = act(u)
  void (*forward)(const Shape&, const T* x, const float* bn, T* y, int64_t task);
  // [2][channels]: sum(du), sum(du (x - mean)), du = dy act'(u)
  void (*sums)(const Shape&, const T* dy, const T* x, const float* bn, float* partial, int64_t task);
  // dx = c0 du + c1 x + c2 + also, c [3][channels]
  void (*backward)(const Shape&, const T* dy, const T* x, const float* bn, const float* c, Also<T> also, T* dx, int64_t task);
  // du <- c0 du + c1 x + c2 + also
  void (*affine)(const Shape&, const T* x, const float* c, Also<T> also, T* du, int64_t task);
};

}  // namespace nvae::bn_act
