// Arguments of the depthwise kernels. Tensors are NHWC and dense, T is float or bfloat16, everything per channel is float.
#pragma once
#include <cstdint>

namespace nvae::depthwise_conv {

constexpr int kMaxKernel = 11;

struct Shape {
  int64_t n, c;
  int h, w;          // of the image that is convolved
  int out_h, out_w;  // (h - 1) / stride + 1
  int kernel, stride, dilation;  // padding is dilation * (kernel - 1) / 2
  int up;   // 2: x is [n][h / 2][w / 2][c], and each of its pixels stands for 2 x 2 of the image (stride, dilation 1); else 1
  int act;  // of the prologue
};

// Rows and columns of the weight as the kernels take it. With `up` a pixel of x lies under neighbouring taps at once, which are
// added beforehand: v[i, j] = w[i, j] + w[i - 1, j] + w[i, j - 1] + w[i - 1, j - 1], one row and column more than w. Then
// y[h] = sum_i v[2 i + kernel / 2 + 1 - h] x[i], along each axis: a quarter of the taps see a pixel of y.
inline int taps_wide(const Shape& s) { return s.kernel + s.up - 1; }

// y = conv(act(u)), zero-padded after the activation, u = scale x + shift as in `bn` [kCoefficients][c] (bn_act.h); bn null:
// y = conv(x). weight [taps_wide^2][c]. stats [n][3][c]: pivot, sum(y - pivot), sum((y - pivot)^2) of each image; null: not wanted.
template <typename T>
struct Forward {
  const T* x;
  const float *bn, *weight;
  T* y;
  float* stats;
};

// From g = c0 dy + c1 y + c2 (c [3][c]: the backward of the BatchNorm behind; c null: g = dy): du, the gradient of u (of x without
// bn; where the stride and `up` are 1 it may take the memory of dy); sums [n][2][c]: sum(du), sum(du (x - mean)) of each image, null: not wanted; dweight [n][taps_wide^2][c], to be added up.
template <typename T>
struct Backward {
  const T *dy, *y, *x;
  const float *c, *bn, *weight;
  T* du;
  float *sums, *dweight;
};

// A task is one image and one vector of channels.
template <typename T>
struct Kernels {
  void (*forward)(const Shape&, const Forward<T>&, int64_t task, float* scratch);
  void (*backward)(const Shape&, const Backward<T>&, int64_t task, float* scratch);
};

// Floats of scratch that a task of either kind needs, at most.
inline int64_t scratch_floats(const Shape& s) {
  const int64_t reach = static_cast<int64_t>(s.dilation) * (s.kernel - 1), row = (s.w + reach) * 16;
  return row * (reach + 2) + 3 * static_cast<int64_t>(s.w) * 16;
}

}  // namespace nvae::depthwise_conv
