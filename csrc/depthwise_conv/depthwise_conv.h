// Arguments of the depthwise kernels. Tensors are NHWC and dense, T is float or bfloat16, everything per channel is float.
#pragma once
#include <cstdint>

namespace nvae::depthwise_conv {

constexpr int kMaxKernel = 11;

struct Shape {
  int64_t n, c;
  int h, w;                // input
  int out_h, out_w;        // output: (h - 1) / stride + 1
  int kernel, stride, dilation;  // padding is dilation * (kernel - 1) / 2
  int act;                 // of the prologue
};

// y = conv(act(x * scale + shift)), zero-padded after the activation; weight [kernel^2][c].
// stats [n][3][c]: a pivot, sum(y - pivot), sum((y - pivot)^2) of each image; null: not wanted.
template <typename T>
struct Forward {
  const T* x;
  const float *scale, *shift, *weight;
  T* y;
  float* stats;
};

// From g = c0 * dy + c1 * y + c2 (the backward of the BN behind; c1 null: g = dy): du, the gradient of u = x * scale + shift;
// sums [n][2][c]: sum(du), sum(du * (x - mean)) of each image; dweight [n][kernel^2][c], to be added over images.
// du may be where dy is when the stride is 1.
template <typename T>
struct Backward {
  const T *dy, *y, *x;
  const float *scale, *shift, *mean, *weight, *c0, *c1, *c2;
  T* du;
  float *sums, *dweight;
};

// Floats of scratch that a task needs, at most.
inline int64_t scratch_floats(const Shape& s) {
  const int64_t reach = static_cast<int64_t>(s.dilation) * (s.kernel - 1), row = (s.w + reach + 1) * 16;
  return row * (reach + 1) + 3 * static_cast<int64_t>(s.w) * 16;
}

// A task is one image and one block of channels; tasks are independent.
struct Kernels {
  int lanes;  // channels of a block
  void (*forward_f32)(const Shape&, const Forward<float>&, int64_t task, float* scratch);
  void (*forward_bf16)(const Shape&, const Forward<uint16_t>&, int64_t task, float* scratch);
  void (*backward_f32)(const Shape&, const Backward<float>&, int64_t task, float* scratch);
  void (*backward_bf16)(const Shape&, const Backward<uint16_t>&, int64_t task, float* scratch);
};

}  // namespace nvae::depthwise_conv
