// The loops of power_iteration over one matrix. Included by common/each_isa.h.

// N rows from `w`, in one go so that v and `sum` are read once for all of them.
template <int N>
void sweep_rows(const float* w, int64_t columns, const float* v, float* s, float* __restrict sum) {
  const float *w0 = w, *w1 = w + (N > 1) * columns, *w2 = w + 2 * (N > 2) * columns, *w3 = w + 3 * (N > 3) * columns;
  if (v) {
    float s0 = 0.0f, s1 = 0.0f, s2 = 0.0f, s3 = 0.0f;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t k = 0; k < columns; k++) {
      s0 += w0[k] * v[k];
      if (N > 1) s1 += w1[k] * v[k], s2 += w2[k] * v[k], s3 += w3[k] * v[k];
    }
    s[0] = s0;
    if (N > 1) s[1] = s1, s[2] = s2, s[3] = s3;
  }
  if (sum) {
    const float s0 = s[0], s1 = N > 1 ? s[1] : 0.0f, s2 = N > 1 ? s[2] : 0.0f, s3 = N > 1 ? s[3] : 0.0f;
#pragma omp simd
    for (int64_t k = 0; k < columns; k++)
      sum[k] += N > 1 ? (s0 * w0[k] + s1 * w1[k]) + (s2 * w2[k] + s3 * w3[k]) : s0 * w0[k];
  }
}

// One pass over W: s = W v unless v is null, then sum = W^T s unless sum is null.
void sweep(const Matrix& m, const float* v, float* s, float* sum) {
  if (sum)
    for (int64_t k = 0; k < m.columns; k++) sum[k] = 0.0f;
  int64_t r = 0;
  for (; r + 4 <= m.rows; r += 4) sweep_rows<4>(m.data + r * m.columns, m.columns, v, s + r, sum);
  for (; r < m.rows; r++) sweep_rows<1>(m.data + r * m.columns, m.columns, v, s + r, sum);
}

float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// out = a / divisor; out may be a.
void divide(const float* a, float divisor, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = a[i] / divisor;
}

// out = factor * a
void scale(const float* a, float factor, int64_t n, float* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = factor * a[i];
}

void scale_add(const float* a, float factor, const float* b, int64_t n, float* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = b[i] + factor * a[i];
}
