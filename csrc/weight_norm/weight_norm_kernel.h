// One row (output channel) of weight_norm: n neighbouring floats of the weight w, the mask (null: none) and the gradient g;
// x = w mask. Included by common/each_isa.h; formulas, and why the arithmetic is double, in kernels/weight_norm/README.md.

template <bool MASK>
double squares_of(const float* w, const float* mask, int64_t n) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    const double x = MASK ? w[i] * mask[i] : w[i];
    sum += x * x;
  }
  return sum;
}

template <bool MASK>
Sums sums_of(const float* g, const float* w, const float* mask, int64_t n) {
  double squares = 0.0, product = 0.0;
#pragma omp simd reduction(+ : squares, product)
  for (int64_t i = 0; i < n; i++) {
    const double x = MASK ? w[i] * mask[i] : w[i];
    squares += x * x;
    product += x * g[i];
  }
  return {squares, product};
}

// out = factor x.
template <bool MASK>
void scale_of(const float* w, const float* mask, double factor, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const double x = MASK ? w[i] * mask[i] : w[i];
    out[i] = static_cast<float>(factor * x);
  }
}

// out = mask (a g - b x).
template <bool MASK>
void combine_of(const float* g, const float* w, const float* mask, double a, double b, float* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const double x = MASK ? w[i] * mask[i] : w[i];
    const float dx = static_cast<float>(a * g[i] - b * x);
    out[i] = MASK ? mask[i] * dx : dx;
  }
}

double squares(const float* w, const float* mask, int64_t n) {
  return mask ? squares_of<true>(w, mask, n) : squares_of<false>(w, mask, n);
}

Sums sums(const float* g, const float* w, const float* mask, int64_t n) {
  return mask ? sums_of<true>(g, w, mask, n) : sums_of<false>(g, w, mask, n);
}

void scale(const float* w, const float* mask, double factor, float* out, int64_t n) {
  mask ? scale_of<true>(w, mask, factor, out, n) : scale_of<false>(w, mask, factor, out, n);
}

void combine(const float* g, const float* w, const float* mask, double a, double b, float* out, int64_t n) {
  mask ? combine_of<true>(g, w, mask, a, b, out, n) : combine_of<false>(g, w, mask, a, b, out, n);
}
