// Forward and backward of logistic_mixture_log_prob on one block of pixels, and the copies between a block and a tensor of any
// layout. Included by common/each_isa.h; derivation in kernels/logistic_mixture/README.md.

// For y <= 80. Below -80 the first is exp(-80), which is nothing beside 1; the second is 0.
NVAE_INLINE Exp parts_below(float y) { return exp_parts(y < -80.0f ? -80.0f : y); }
NVAE_INLINE float exp_or_tiny(float y) { return exp_of(parts_below(y)); }
NVAE_INLINE float exp_or_zero(float y) {
  const float e = exp_or_tiny(y);
  return y < -80.0f ? 0.0f : e;
}

// log_positive, but NaN for NaN.
NVAE_INLINE float log_or_nan(float x) { return log_positive(x) + (x - x); }

// v - top, which no v exceeds; 0 where every v is -inf.
NVAE_INLINE float below(float v, float top) { return top < -3e38f ? 0.0f : v - top; }

NVAE_INLINE float absolute(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
NVAE_INLINE float signed_as(float magnitude, float sign) {
  return float_of(bits_of(magnitude) ^ (bits_of(sign) & 0x80000000u));
}

struct Tanh {
  float value, slope;
};

// From e = exp(-2|x|): tanh|x| = (1 - e) / (1 + e) = 1 - 2e / (1 + e), whichever keeps more digits.
NVAE_INLINE Tanh tanh_both(float x) {
  const Exp parts = parts_below(-2.0f * absolute(x));
  const float e = exp_of(parts);
  const bool large = e < 0.3f;
  const float q = (large ? 2.0f * e : -expm1_of(parts)) / (1.0f + e), rest = 1.0f - q;
  return {signed_as(large ? rest : q, x), large ? q * (1.0f + rest) : rest * (1.0f + q)};
}

NVAE_INLINE float clamp_scale(float raw) { return raw < -7.0f ? -7.0f : raw; }

struct Element {
  float factor, rest;  // log P = log(factor) + rest, the factor between 1e-5 and 1
  float by_d, by_l;
};

// One channel under one component, and the derivatives of log P by d and by the log-scale. The inner cases are even in d: they are
// computed at |d|, where plus >= 0. The density is the mass with h -> 0.
NVAE_INLINE Element element(float d, float raw, float i, float y, float half_bin, float log_bin, float top) {
  const float l = clamp_scale(raw);
  // Scaled after the sum, as the reference does it: near a boundary of the bin that keeps digits.
  const float near = absolute(d), h = i * half_bin, a = i * near, plus = i * (near + half_bin), minus = i * (near - half_bin);
  const Exp half = parts_below(-h);
  const float v = exp_of(half), gap = -expm1_of(half) * (1.0f + v);  // 1 - exp(-2h)
  const float u = exp_or_tiny(-a), e_plus = u * v, e_minus = exp_or_tiny(-absolute(minus));

  // delta = exp(min(-minus, 0)) gap / ((1 + e_plus) (1 + e_minus)): a product, which keeps its digits in both tails.
  const bool mass = (minus > 0.0f ? e_minus : 1.0f) * gap > 1e-5f * ((1.0f + e_plus) * (1.0f + e_minus));
  const float plus_in = mass ? plus : a, minus_in = mass ? minus : a;
  const float ep = mass ? e_plus : u, em = mass ? e_minus : u;

  // Both edges are log sigmoid(t).
  const bool bottom = y < -0.999f, edge = bottom | (y > top);
  const bool outside = (bottom ? d : -d) < 0.0f;
  const float t = outside ? -minus : plus, e_t = outside ? e_minus : e_plus;

  const float p1 = 1.0f + ep, m1 = 1.0f + em, t1 = 1.0f + e_t, g = mass ? gap : 1.0f;
  const float product = p1 * m1, inverse = 1.0f / (edge ? t1 : product * g);
  const float q = inverse * g;  // 1 / (p1 m1)

  // 1 / (1 + e_t) rounds to 1 where e_t is small: the last term gives log1p its digits back.
  const float log_edge = (t > 0.0f ? 0.0f : t) + ((1.0f - inverse) - inverse * e_t);
  const float log_inner = (minus_in < 0.0f ? 0.0f : -minus_in) + (mass ? 0.0f : log_bin - l);

  const float survival_t = (t > 0.0f ? e_t : 1.0f) * inverse;  // 1 - sigmoid(t)
  const float survival = ep * (m1 * q), cdf = (minus_in > 0.0f ? 1.0f : em) * (p1 * q);
  const float slope_of_gap = mass ? 2.0f * h * (v * v) * (product * inverse) : 1.0f;
  const float by_l = edge ? -t * survival_t : minus_in * cdf - plus_in * survival - slope_of_gap;
  return {edge ? inverse : g * q, edge ? log_edge : log_inner,
          i * (edge ? (bottom ? survival_t : -survival_t) : signed_as(survival - cdf, d)), raw >= -7.0f ? by_l : 0.0f};
}

// Where the rows of component k begin in params.
struct Layout {
  int64_t mean, log_scale, coefficient, colour_step, pair_step;
};

NVAE_INLINE Layout layout(const Settings& s, int64_t k) {
  const int64_t m = s.mixtures, c = s.channels;
  if (c == 3) return {m + k, 2 * m + k, 3 * m + k, 3 * m, 3 * m};
  return {m + k, 2 * m + k, m + 2 * m * c + k, 2 * m, m};
}

NVAE_INLINE const float* row(const Rows& r, int64_t i) { return r.data + i * r.stride; }

NVAE_INLINE float* scratch_row(const Inputs& in, int64_t i) { return in.scratch + i * kBlock; }

// out = max_k v_k and log sum_k exp(v_k - max), or the sum itself.
template <bool LOG>
void reduce(const float* v, int64_t stride, int count, int n, float* __restrict top, float* __restrict sum) {
  for (int i = 0; i < n; i++) top[i] = v[i], sum[i] = 0.0f;
  for (int k = 1; k < count; k++) {
    const float* term = v + k * stride;
    for (int i = 0; i < n; i++) top[i] = term[i] > top[i] ? term[i] : top[i];
  }
  for (int k = 0; k < count; k++) {
    const float* term = v + k * stride;
#pragma omp simd
    for (int i = 0; i < n; i++) sum[i] += exp_or_zero(below(term[i], top[i]));
  }
  if (LOG)
    for (int i = 0; i < n; i++) sum[i] = log_or_nan(sum[i]);
}

constexpr int kFactors = 4;  // of this many channels one logarithm is taken: their product is 1e-20 or more

// Log-probability of each component, its share of the softmax of the logits included: terms [M]. With GRADIENT the derivatives of
// log P by mean, log-scale and coefficient go where those of log p will stand.
template <bool GRADIENT>
void components(const Inputs& in, const Rows& out) {
  const int n = in.n, channels = in.settings.channels, mixtures = in.settings.mixtures;
  const float half_bin = in.settings.half_bin, log_bin = in.settings.log_bin, top_level = in.settings.top;
  float *__restrict top = scratch_row(in, 0), *__restrict sum = scratch_row(in, 1), *__restrict centre = scratch_row(in, 2);
  float *__restrict factor = scratch_row(in, 3), *__restrict inverse_scale = scratch_row(in, 4), *image = scratch_row(in, 5);
  for (int c = 0; c < channels; c++) {
    const float* x = row(in.x, c);
    float* __restrict y = image + c * kBlock;
    for (int i = 0; i < n; i++) y[i] = 2.0f * x[i] - 1.0f;
  }
  reduce<true>(in.params.data, in.params.stride, mixtures, n, top, sum);

  for (int64_t k = 0; k < mixtures; k++) {
    const Layout at = layout(in.settings, k);
    const float* logit = row(in.params, k);
    float* __restrict term = image + (channels + k) * kBlock;
    for (int i = 0; i < n; i++) term[i] = 0.0f, factor[i] = 1.0f;
    for (int64_t c = 0, pair = 0; c < channels; c++) {
      const int64_t at_mean = at.mean + c * at.colour_step, at_scale = at.log_scale + c * at.colour_step;
      const float *y = image + c * kBlock, *mean = row(in.params, at_mean), *log_scale = row(in.params, at_scale);
      // A loop of its own: one loop for everything would wait for one long chain of dependent steps.
#pragma omp simd
      for (int i = 0; i < n; i++) centre[i] = y[i] - mean[i], inverse_scale[i] = exp_or_tiny(-clamp_scale(log_scale[i]));
      for (int64_t j = 0; j < c; j++, pair++) {
        const int64_t at_pair = at.coefficient + pair * at.pair_step;
        const float *raw = row(in.params, at_pair), *earlier = image + j * kBlock;
        float* __restrict by_raw = out.data + at_pair * out.stride;
#pragma omp simd
        for (int i = 0; i < n; i++) {
          const Tanh a = tanh_both(raw[i]);
          centre[i] -= a.value * earlier[i];
          if (GRADIENT) by_raw[i] = earlier[i] * a.slope;
        }
      }
      float *__restrict by_d = out.data + at_mean * out.stride, *__restrict by_l = out.data + at_scale * out.stride;
#pragma omp simd
      for (int i = 0; i < n; i++) {
        const Element e = element(centre[i], log_scale[i], inverse_scale[i], y[i], half_bin, log_bin, top_level);
        term[i] += e.rest;
        factor[i] *= e.factor;
        if (GRADIENT) by_d[i] = e.by_d, by_l[i] = e.by_l;
      }
      if (c % kFactors == kFactors - 1 || c == channels - 1)
        for (int i = 0; i < n; i++) term[i] += log_positive(factor[i]), factor[i] = 1.0f;
    }
    for (int i = 0; i < n; i++) term[i] += (logit[i] - top[i]) - sum[i];
  }
}

void forward_block(const Inputs& in, float* __restrict out) {
  const int n = in.n;
  components<false>(in, Rows{nullptr, 0});
  float *__restrict top = scratch_row(in, 0), *__restrict sum = scratch_row(in, 1);
  reduce<true>(scratch_row(in, 5 + in.settings.channels), kBlock, in.settings.mixtures, n, top, sum);
  for (int i = 0; i < n; i++) out[i] = top[i] + sum[i];
}

void backward_block(const Inputs& in, const float* grad, const Rows& out) {
  const int n = in.n, channels = in.settings.channels, mixtures = in.settings.mixtures;
  components<true>(in, out);
  // The logits' share goes into dlogit first: their maximum and sum make room for those of the terms.
  const float *logit_top = scratch_row(in, 0), *logit_sum = scratch_row(in, 1);
  for (int k = 0; k < mixtures; k++) {
    const float* logit = row(in.params, k);
    float* __restrict dlogit = out.data + k * out.stride;
#pragma omp simd
    for (int i = 0; i < n; i++) dlogit[i] = grad[i] * exp_or_zero((logit[i] - logit_top[i]) - logit_sum[i]);
  }
  const float* terms = scratch_row(in, 5 + channels);
  float *__restrict top = scratch_row(in, 0), *__restrict sum = scratch_row(in, 1), *__restrict share = scratch_row(in, 2);
  reduce<false>(terms, kBlock, mixtures, n, top, sum);
  for (int64_t k = 0; k < mixtures; k++) {
    const Layout at = layout(in.settings, k);
    const float* term = terms + k * kBlock;
    float* __restrict dlogit = out.data + k * out.stride;
#pragma omp simd
    for (int i = 0; i < n; i++) {
      share[i] = grad[i] * (exp_or_zero(below(term[i], top[i])) / sum[i]);
      dlogit[i] = share[i] - dlogit[i];
    }
    for (int64_t c = 0, pair = 0; c < channels; c++) {
      float* __restrict dmean = out.data + (at.mean + c * at.colour_step) * out.stride;
      float* __restrict dlog_scale = out.data + (at.log_scale + c * at.colour_step) * out.stride;
      for (int i = 0; i < n; i++) dmean[i] *= -share[i], dlog_scale[i] *= share[i];
      for (int64_t j = 0; j < c; j++, pair++) {
        float* __restrict draw = out.data + (at.coefficient + pair * at.pair_step) * out.stride;
        for (int i = 0; i < n; i++) draw[i] *= dmean[i];
      }
    }
  }
}

NVAE_INLINE float widen(float x) { return x; }
NVAE_INLINE float widen(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
NVAE_INLINE void narrow(float x, float& out) { out = x; }
NVAE_INLINE void narrow(float x, uint16_t& out) {  // to nearest even; NaN stays NaN
  const uint32_t u = bits_of(x), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : rounded);
}

typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));
typedef uint16_t FourHalves __attribute__((vector_size(8)));

NVAE_INLINE Four load_four(const float* p) {
  Four x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
NVAE_INLINE Four load_four(const uint16_t* p) {
  FourHalves x;
  __builtin_memcpy(&x, p, sizeof x);
  return (Four)(__builtin_convertvector(x, FourBits) << 16);
}
NVAE_INLINE void store_four(Four x, float* p) { __builtin_memcpy(p, &x, sizeof x); }
NVAE_INLINE void store_four(Four x, uint16_t* p) {
  const FourBits u = (FourBits)x, rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const FourHalves bits = __builtin_convertvector(x != x ? (u >> 16) | 0x40u : rounded, FourHalves);
  __builtin_memcpy(p, &bits, sizeof bits);
}

NVAE_INLINE void transpose(Four (&t)[4]) {
  const Four a{t[0][0], t[1][0], t[0][1], t[1][1]}, b{t[0][2], t[1][2], t[0][3], t[1][3]};
  const Four c{t[2][0], t[3][0], t[2][1], t[3][1]}, d{t[2][2], t[3][2], t[2][3], t[3][3]};
  t[0] = Four{a[0], a[1], c[0], c[1]}, t[1] = Four{a[2], a[3], c[2], c[3]};
  t[2] = Four{b[0], b[1], d[0], d[1]}, t[3] = Four{b[2], b[3], d[2], d[3]};
}

// f(c, i) for the corners of 4 channels x 4 pixels, 16 channels (a cache line) at a time; what is left over is not visited.
template <typename F>
NVAE_INLINE void for_each_tile(int channels, int n, const F& f) {
  for (int line = 0; line + 4 <= channels; line += 16)
    for (int i = 0; i + 4 <= n; i += 4)
      for (int c = line; c < line + 16 && c + 4 <= channels; c += 4) f(c, i);
}

template <typename T>
void gather(const Pixels<const T>& from, const Rows& to) {
  const bool tiles = from.stride_c == 1 && !from.neighbours;
  if (tiles)
    for_each_tile(from.channels, from.n, [&](int c, int i) __attribute__((always_inline)) {
      Four t[4];
      for (int p = 0; p < 4; p++) t[p] = load_four(from.data + from.offset[i + p] + c);
      transpose(t);
      for (int q = 0; q < 4; q++) store_four(t[q], to.data + (c + q) * to.stride + i);
    });
  for (int64_t c = 0; c < from.channels; c++) {
    const T* source = from.data + c * from.stride_c;
    float* __restrict target = to.data + c * to.stride;
    if (from.neighbours)
      for (int i = 0; i < from.n; i++) target[i] = widen(source[from.offset[0] + i]);
    else
      for (int i = tiles && c < from.channels / 4 * 4 ? from.n / 4 * 4 : 0; i < from.n; i++)
        target[i] = widen(source[from.offset[i]]);
  }
}

template <typename T>
void scatter(const Rows& from, const Pixels<T>& to) {
  const bool tiles = to.stride_c == 1 && !to.neighbours;
  if (tiles)
    for_each_tile(to.channels, to.n, [&](int c, int i) __attribute__((always_inline)) {
      Four t[4];
      for (int q = 0; q < 4; q++) t[q] = load_four(from.data + (c + q) * from.stride + i);
      transpose(t);
      for (int p = 0; p < 4; p++) store_four(t[p], to.data + to.offset[i + p] + c);
    });
  for (int64_t c = 0; c < to.channels; c++) {
    const float* source = from.data + c * from.stride;
    T* __restrict target = to.data + c * to.stride_c;
    if (to.neighbours)
      for (int i = 0; i < to.n; i++) narrow(source[i], target[to.offset[0] + i]);
    else
      for (int i = tiles && c < to.channels / 4 * 4 ? to.n / 4 * 4 : 0; i < to.n; i++)
        narrow(source[i], target[to.offset[i]]);
  }
}
