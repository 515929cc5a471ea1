// Arguments of the squeeze-excitation kernels. x, skip, y are [images][pixels][channels], dense; T is float or bfloat16, the rest
// float. Let v = scale x + shift (Affine), v = x without. A task is one image.
#pragma once
#include <cstdint>

namespace nvae::se_residual {

struct Shape {
  int64_t images, pixels, channels, hidden;  // hidden 0: no gate
  float residual_scale;
};

// The gate's weights: w1 [hidden][channels], b1 [hidden], w2 transposed to [hidden][channels], b2 [channels].
struct Gate {
  const float *w1, *b1, *w2, *b2;
};

// What stands before the op, [channels] each: a normalisation, or (without mean and scale: 0 and 1) a bias alone, or nothing.
struct Affine {
  const float *mean, *scale, *shift;
};

// What a pass over an image needs to know of it: [channels] each, from the kernels below.
struct Image {
  float *x_mean, *gate, *slope, *squeezed;  // mean of x; sigmoid(w2 squeezed + b2); sigmoid'; relu(w1 (mean of v) + b1) [hidden]
};

template <typename T>
struct Kernels {
  // y = skip + residual_scale gate v; x_means [channels] of the image, null: taken here. stats [3][channels] of y, or null.
  void (*forward)(const Shape&, const Gate&, const T* skip, const T* x, const Affine&, const float* x_means, const Image&, T* y,
                  float* stats, int64_t task);
  // sums [2][channels] of the image: sum(dy), sum(dy (x - mean))
  void (*sums)(const Shape&, const T* dy, const T* x, const Affine&, float* sums, int64_t task);
  // dx = a dy + b, a and b [channels] of the image
  void (*backward)(const Shape&, const T* dy, const float* a, const float* b, T* dx, int64_t task);
};

}  // namespace nvae::se_residual
