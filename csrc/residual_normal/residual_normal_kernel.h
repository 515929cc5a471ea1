// Forward and backward of residual_normal on one block. Included by common/each_isa.h; derivation in
// kernels/residual_normal/README.md.

// c = 5 tanh(a / 5) and dc/da, from E = expm1(0.4 |a|): |c| = 5 E / (E + 2) = 5 - 10 / (E + 2), whichever of the two does
// not amplify rounding (exp(c) turns an error of c near 5 into a relative one), and dc/da = 4 (E + 1) / (E + 2)^2.
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
  const float em1 = expm1_of(e), denominator = em1 + 2.0f, inverse = 1.0f / denominator;
  const bool large = em1 > 3.0f;
  const float quotient = (large ? 10.0f : 5.0f * em1) / denominator;
  const float c = large ? 5.0f - quotient : quotient;
  return {float_of(bits_of(c) | sign), 4.0f * exp_of(e) * inverse * inverse};
}

struct Normal {
  float mu, sigma, dmu, dsigma;  // and the slopes of mu and sigma by the raw outputs
};

NVAE_INLINE Normal normal(float mu, float log_sigma) {
  const Clamp m = soft_clamp(mu), s = soft_clamp(log_sigma);
  const float e = exp_of(exp_parts(s.value));
  return {m.value, e + 0.01f, m.slope, e * s.slope};
}

struct Element {
  Normal p, q;
  float z, inverse;   // 1 / sigma_p
  float d, ratio, v;  // (mu_q - mu_p) / sigma_p, sigma_q / sigma_p, (z - mu_p) / sigma_p
};

// PRIOR: 0 none given, hence Normal(0, 0); 1 given; 2 given, and q is relative to it.
template <int PRIOR>
NVAE_INLINE Element element(float mu_q, float log_sigma_q, float mu_p, float log_sigma_p, float noise) {
  const Normal p = PRIOR ? normal(mu_p, log_sigma_p) : Normal{0.0f, 1.01f, 0.0f, 0.0f};
  const Normal q = PRIOR == 2 ? normal(mu_p + mu_q, log_sigma_p + log_sigma_q) : normal(mu_q, log_sigma_q);
  const float z = q.mu + q.sigma * noise, inverse = 1.0f / p.sigma;
  return {p, q, z, inverse, (q.mu - p.mu) * inverse, q.sigma * inverse, (z - p.mu) * inverse};
}

// In both loops every pointer is a local variable: GCC does not vectorise one that it must read from a struct each time.

template <int PRIOR>
Sums forward_of(const Inputs& in, float* __restrict z_out) {
  const float *mu_q = in.mu_q, *log_sigma_q = in.log_sigma_q, *mu_p = in.mu_p, *log_sigma_p = in.log_sigma_p;
  const float* noise = in.noise;
  const int n = in.n;
  const float half_log_2pi = 0.91893853320467274f;
  float kl = 0.0f, log_q = 0.0f, log_p = 0.0f;
#pragma omp simd reduction(+ : kl, log_q, log_p)
  for (int i = 0; i < n; i++) {
    const Element e =
        element<PRIOR>(mu_q[i], log_sigma_q[i], PRIOR ? mu_p[i] : 0.0f, PRIOR ? log_sigma_p[i] : 0.0f, noise[i]);
    // log sigma_p comes as a difference, and r^2 - 1 as a product, so that a small KL keeps its digits.
    const float log_ratio = log_positive(e.ratio), log_sigma = log_positive(e.q.sigma);
    z_out[i] = e.z;
    kl += 0.5f * (e.d * e.d) + (0.5f * (e.ratio - 1.0f) * (e.ratio + 1.0f) - log_ratio);
    log_q += -0.5f * (noise[i] * noise[i]) - half_log_2pi - log_sigma;
    log_p += -0.5f * (e.v * e.v) - half_log_2pi - (log_sigma - log_ratio);
  }
  return {kl, log_q, log_p};
}

template <int PRIOR>
void backward_of(const Inputs& in, const Gradients& g) {
  const float *mu_q = in.mu_q, *log_sigma_q = in.log_sigma_q, *mu_p = in.mu_p, *log_sigma_p = in.log_sigma_p;
  const float *noise = in.noise, *dz = g.dz;
  float *__restrict out_mu_q = g.mu_q, *__restrict out_ls_q = g.log_sigma_q;
  float *__restrict out_mu_p = g.mu_p, *__restrict out_ls_p = g.log_sigma_p;
  const float gk = g.row.kl, gq = g.row.log_q, gp = g.row.log_p;
  const int n = in.n;
#pragma omp simd
  for (int i = 0; i < n; i++) {
    const Element e =
        element<PRIOR>(mu_q[i], log_sigma_q[i], PRIOR ? mu_p[i] : 0.0f, PRIOR ? log_sigma_p[i] : 0.0f, noise[i]);
    const float inverse_q = 1.0f / e.q.sigma, gz = dz[i] - gp * e.v * e.inverse;
    const float dmu = (gz + gk * e.d * e.inverse) * e.q.dmu;
    const float dls = (gz * noise[i] + gk * (e.ratio * e.inverse - inverse_q) - gq * inverse_q) * e.q.dsigma;
    out_mu_q[i] = dmu;
    out_ls_q[i] = dls;
    if (PRIOR) {
      const float dmu_p = (gp * e.v - gk * e.d) * e.inverse * e.p.dmu;
      const float by_sigma = gk * (1.0f - e.d * e.d - e.ratio * e.ratio) + gp * (e.v * e.v - 1.0f);
      const float dls_p = by_sigma * e.inverse * e.p.dsigma;
      out_mu_p[i] = PRIOR == 2 ? dmu_p + dmu : dmu_p;
      out_ls_p[i] = PRIOR == 2 ? dls_p + dls : dls_p;
    }
  }
}

Sums forward_block(const Inputs& in, float* z) {
  if (!in.mu_p) return forward_of<0>(in, z);
  return in.residual ? forward_of<2>(in, z) : forward_of<1>(in, z);
}

void backward_block(const Inputs& in, const Gradients& g) {
  if (!in.mu_p) return backward_of<0>(in, g);
  return in.residual ? backward_of<2>(in, g) : backward_of<1>(in, g);
}
