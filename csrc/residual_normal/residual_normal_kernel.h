// Forward and backward of residual_normal on one tile. Included by common/each_isa.h; derivation in
// kernels/residual_normal/README.md.

// c = 5 tanh(a / 5) and dc/da, from E = expm1(0.4 |a|): |c| = 5 E / (E + 2) = 5 - 10 / (E + 2), whichever of the two does
// not amplify rounding (exp(c) turns an error of c near 5 into a relative one); dc/da = 4 (E + 1) / (E + 2)^2 = 1 - (c / 5)^2.
struct Clamp {
  float value, slope;
};

NVAE_INLINE Clamp soft_clamp(float a) {
  const uint32_t sign = bits_of(a) & 0x80000000u;
  float x = float_of(bits_of(a) ^ sign);
  x = x > 100.0f ? 100.0f : x;
  // 0.4 x is reduced before it is multiplied out: steps of ln2 / 0.4 = 1.732421875 + 4.460764e-4.
  const Rounded n = round_to_step(x, 0.57707801635f);
  const Exp e = exp_reduced(n, 0.4f * ((x - n.n * 1.732421875f) - n.n * 4.4607640e-4f));
  const float em1 = expm1_of(e);
  const bool large = em1 > 3.0f;
  const float quotient = (large ? 10.0f : 5.0f * em1) / (em1 + 2.0f), square = 0.04f * (quotient * quotient);
  const float c = large ? 5.0f - quotient : quotient;
  return {float_of(bits_of(c) | sign), large ? exp_of(e) * square : 1.0f - square};
}

// Several short loops over a tile instead of one long one: the chain of operations of an element is longer than what a CPU
// looks ahead, so that one loop would wait for it. Whole vectors only (n is a multiple of kLanes): an element's bits do not
// depend on its place. Every pointer is a local variable: GCC does not vectorise one that it must read from a struct each time.

// c5 and its slope at the sum of COUNT terms, the later ones first.
template <int COUNT, bool SLOPE>
void clamps(const float* a, const float* b, const float* c, int n, float* __restrict value, float* __restrict slope) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const float last = COUNT == 1 ? a[i] : b[i] + a[i];
    const Clamp found = soft_clamp(COUNT == 3 ? c[i] + last : last);
    value[i] = found.value;
    if (SLOPE) slope[i] = found.slope;
  }
}

// exp(c) + 0.01 and its slope, in place of c and its slope.
template <bool SLOPE>
void sigmas(int n, float* __restrict value, float* __restrict slope) {
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const float e = exp_of(exp_parts(value[i]));
    value[i] = e + 0.01f;
    if (SLOPE) slope[i] *= e;
  }
}

struct Normal {
  alignas(64) float mu[kTile], sigma[kTile], dmu[kTile], dsigma[kTile];  // and the slopes of mu and sigma by the raw outputs
};

template <bool SLOPES>
void normal(const float* mu, const float* log_sigma, int n, Normal& to) {
  clamps<1, SLOPES>(mu, nullptr, nullptr, n, to.mu, to.dmu);
  clamps<1, SLOPES>(log_sigma, nullptr, nullptr, n, to.sigma, to.dsigma);
  sigmas<SLOPES>(n, to.sigma, to.dsigma);
}

// PRIOR: 0 none given, hence Normal(0, 0); 1 given; 2 given, and q is relative to it.
template <int PRIOR, bool SLOPES>
void normals(const Inputs& in, Normal& q, Normal& p) {
  constexpr int kTerms = PRIOR == 2 ? 3 : 2;
  clamps<kTerms, SLOPES>(in.mu_q, in.bias_mu, in.mu_p, in.n, q.mu, q.dmu);
  clamps<kTerms, SLOPES>(in.log_sigma_q, in.bias_log_sigma, in.log_sigma_p, in.n, q.sigma, q.dsigma);
  sigmas<SLOPES>(in.n, q.sigma, q.dsigma);
  if (PRIOR) normal<SLOPES>(in.mu_p, in.log_sigma_p, in.n, p);
}

struct Element {
  float z, inverse;   // 1 / sigma_p
  float d, ratio, v;  // (mu_q - mu_p) / sigma_p, sigma_q / sigma_p, (z - mu_p) / sigma_p
};

NVAE_INLINE Element element(float mu, float sigma, float mu_p, float sigma_p, float noise) {
  const float z = mu + sigma * noise, inverse = 1.0f / sigma_p;
  return {z, inverse, (mu - mu_p) * inverse, sigma * inverse, (z - mu_p) * inverse};
}

template <int PRIOR>
void forward_of(const Inputs& in, const Outputs& out) {
  Normal q, p;
  normals<PRIOR, false>(in, q, p);
  const float* noise = in.noise;
  float *__restrict z = out.z, *__restrict kl = out.kl, *__restrict log_q = out.log_q, *__restrict log_p = out.log_p;
  const int n = in.n;
  const float half_log_2pi = 0.91893853320467274f;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const Element e = element(q.mu[i], q.sigma[i], PRIOR ? p.mu[i] : 0.0f, PRIOR ? p.sigma[i] : 1.01f, noise[i]);
    // log sigma_p comes as a difference, and r^2 - 1 as a product, so that a small KL keeps its digits.
    const float log_ratio = log_positive(e.ratio), log_sigma = log_positive(q.sigma[i]);
    z[i] = e.z;
    kl[i] = 0.5f * (e.d * e.d) + (0.5f * (e.ratio - 1.0f) * (e.ratio + 1.0f) - log_ratio);
    // The zero is NaN where z would be by its parameters, which log_positive loses.
    log_q[i] = -0.5f * (noise[i] * noise[i]) - half_log_2pi - log_sigma + 0.0f * (q.mu[i] + q.sigma[i]);
    log_p[i] = -0.5f * (e.v * e.v) - half_log_2pi - (log_sigma - log_ratio);
  }
}

template <int PRIOR, bool ALSO>
void backward_of(const Inputs& in, const Gradients& g) {
  Normal q, p;
  normals<PRIOR, true>(in, q, p);
  const float *noise = in.noise, *dz = g.z, *dkl = g.kl, *dlog_q = g.log_q, *dlog_p = g.log_p;
  float *__restrict out_mu_q = g.mu_q, *__restrict out_ls_q = g.log_sigma_q;
  float *__restrict out_mu_p = g.mu_p, *__restrict out_ls_p = g.log_sigma_p;
  const float *also_mu = g.also_mu_p, *also_ls = g.also_log_sigma_p;
  const int n = in.n;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const Element e = element(q.mu[i], q.sigma[i], PRIOR ? p.mu[i] : 0.0f, PRIOR ? p.sigma[i] : 1.01f, noise[i]);
    const float gk = dkl[i], gq = dlog_q[i], gp = dlog_p[i];
    const float inverse_q = 1.0f / q.sigma[i], gz = dz[i] - gp * e.v * e.inverse;
    const float dmu = (gz + gk * e.d * e.inverse) * q.dmu[i];
    const float dls = (gz * noise[i] + gk * (e.ratio * e.inverse - inverse_q) - gq * inverse_q) * q.dsigma[i];
    out_mu_q[i] = dmu;
    out_ls_q[i] = dls;
    if (PRIOR) {
      const float dmu_p = (gp * e.v - gk * e.d) * e.inverse * p.dmu[i];
      const float by_sigma = gk * (1.0f - e.d * e.d - e.ratio * e.ratio) + gp * (e.v * e.v - 1.0f);
      const float dls_p = by_sigma * e.inverse * p.dsigma[i];
      const float all_mu = PRIOR == 2 ? dmu_p + dmu : dmu_p, all_ls = PRIOR == 2 ? dls_p + dls : dls_p;
      out_mu_p[i] = ALSO ? all_mu + also_mu[i] : all_mu;
      out_ls_p[i] = ALSO ? all_ls + also_ls[i] : all_ls;
    }
  }
}

void forward_tile(const Inputs& in, const Outputs& out) {
  if (!in.mu_p) return forward_of<0>(in, out);
  return in.residual ? forward_of<2>(in, out) : forward_of<1>(in, out);
}

void backward_tile(const Inputs& in, const Gradients& g) {
  if (!in.mu_p) return backward_of<0, false>(in, g);
  if (g.also_mu_p) return in.residual ? backward_of<2, true>(in, g) : backward_of<1, true>(in, g);
  return in.residual ? backward_of<2, false>(in, g) : backward_of<1, false>(in, g);
}

template <bool GIVEN>
void log_prob_forward_of(const DensityInputs& in, float* __restrict log_p) {
  Normal p;
  if (GIVEN) normal<false>(in.mu, in.log_sigma, in.n, p);
  const float* z = in.z;
  const int n = in.n;
  const float half_log_2pi = 0.91893853320467274f;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const float sigma = GIVEN ? p.sigma[i] : 1.01f, v = (z[i] - (GIVEN ? p.mu[i] : 0.0f)) / sigma;
    log_p[i] = -0.5f * (v * v) - half_log_2pi - log_positive(sigma);
  }
}

template <bool GIVEN, bool ALSO>
void log_prob_backward_of(const DensityInputs& in, const DensityGradients& g) {
  Normal p;
  if (GIVEN) normal<true>(in.mu, in.log_sigma, in.n, p);
  const float *z = in.z, *dlog_p = g.log_p, *dkl = g.kl, *also = g.also_z;
  float *__restrict dz = g.z, *__restrict dmu = g.mu, *__restrict dls = g.log_sigma;
  const int n = in.n;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const float inverse = 1.0f / (GIVEN ? p.sigma[i] : 1.01f), v = (z[i] - (GIVEN ? p.mu[i] : 0.0f)) * inverse;
    const float by_sum = (dlog_p[i] - dkl[i]) * inverse;
    dz[i] = ALSO ? also[i] - by_sum * v : -by_sum * v;
    if (GIVEN) {
      dmu[i] = by_sum * v * p.dmu[i];
      dls[i] = by_sum * (v * v - 1.0f) * p.dsigma[i];
    }
  }
}

void log_prob_forward_tile(const DensityInputs& in, float* log_p) {
  in.mu ? log_prob_forward_of<true>(in, log_p) : log_prob_forward_of<false>(in, log_p);
}

void log_prob_backward_tile(const DensityInputs& in, const DensityGradients& g) {
  if (g.also_z) return in.mu ? log_prob_backward_of<true, true>(in, g) : log_prob_backward_of<false, true>(in, g);
  in.mu ? log_prob_backward_of<true, false>(in, g) : log_prob_backward_of<false, false>(in, g);
}

typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// to [pixels][width] = from, whose pixels are `stride` apart; width >= kLanes. The last vector of a pixel overlaps the one before.
void copy_pixels(const float* from, int64_t stride, int pixels, int width, float* __restrict to) {
  for (int p = 0; p < pixels; p++, from += stride, to += width) {
    for (int c = 0; c + kLanes < width; c += kLanes) *(Lanes*)(to + c) = *(const Lanes*)(from + c);
    *(Lanes*)(to + width - kLanes) = *(const Lanes*)(from + width - kLanes);
  }
}

// sums [kLanes][width] += terms [pixels][width], which hold n elements and zeros up to the next multiple of kLanes. That a sum
// per lane of the pixels can be taken so in any order of the elements is what makes a row's bits the same in every layout.
void add_tile(const float* terms, int n, int width, float* sums) {
  const int round = kLanes * width;
  for (int i = 0; i < round && i < n; i += kLanes) {
    Lanes sum = *(const Lanes*)(sums + i);
    for (int k = i; k < n; k += round) sum += *(const Lanes*)(terms + k);
    *(Lanes*)(sums + i) = sum;
  }
}

// Adds up the lanes: the result stands in sums[0 .. width).
void join_lanes(float* sums, int width) {
  for (int half = kLanes / 2 * width; half >= width; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
}
