// One step of Adamax on a run of elements, in the order of torch's own. Included by common/each_isa.h.

// Without weight decay the parameter does not enter its gradient: 0 * inf would be NaN.
template <bool DECAY, bool EMA>
void update_of(const Elements& e, const Step& step) {
  float* __restrict param = e.param;
  const float* __restrict grad = e.grad;
  float *__restrict exp_avg = e.exp_avg, *__restrict exp_inf = e.exp_inf, *__restrict ema = e.ema;
  const float size = step.size, beta2 = step.beta2, eps = step.eps, decay = step.decay, factor = step.factor;
  const float ema_weight = step.ema_weight;
  // lerp(m, g, w) is m + w (g - m) for w < 1/2, else g + (w - 1) (g - m).
  const bool near_average = step.weight < 0.5f;
  const float weight = near_average ? step.weight : step.weight - 1.0f;
  const int64_t n = e.n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float x = param[i];
    const float g = DECAY ? factor * grad[i] + decay * x : factor * grad[i];
    const float m = (near_average ? exp_avg[i] : g) + weight * (g - exp_avg[i]);
    const float old = beta2 * exp_inf[i], now = __builtin_fabsf(g) + eps;
    const float u = (old > now) | (old != old) ? old : now;  // NaN in either stays
    const float y = x + size * m / u;
    exp_avg[i] = m;
    exp_inf[i] = u;
    param[i] = y;
    if (EMA) ema[i] += ema_weight * (y - ema[i]);
  }
}

void update(const Elements& e, const Step& step) {
  if (e.ema) return step.decay != 0.0f ? update_of<true, true>(e, step) : update_of<false, true>(e, step);
  step.decay != 0.0f ? update_of<true, false>(e, step) : update_of<false, false>(e, step);
}

// The sum of x^2 in double, which no finite floats overflow: it is finite just where they are.
double squares(const float* x, int64_t n) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; l++) lanes[l] += static_cast<double>(x[i + l]) * x[i + l];
  double sum = 0.0;
  for (; i < n; i++) sum += static_cast<double>(x[i]) * x[i];
  for (int l = 0; l < kLanes; l++) sum += lanes[l];
  return sum;
}
