// One step of Adamax on a run of elements, in the order of torch's own. Included by common/each_isa.h.

// Without weight decay the parameter does not enter its gradient: 0 * inf would be NaN.
template <bool DECAY>
void update_of(const Elements& e, const Step& step) {
  float* __restrict param = e.param;
  const float* __restrict grad = e.grad;
  float *__restrict exp_avg = e.exp_avg, *__restrict exp_inf = e.exp_inf;
  const float size = step.size, beta2 = step.beta2, eps = step.eps, decay = step.decay, sign = step.sign;
  // lerp(m, g, w) is m + w (g - m) for w < 1/2, else g + (w - 1) (g - m).
  const bool near_average = step.weight < 0.5f;
  const float weight = near_average ? step.weight : step.weight - 1.0f;
  const int64_t n = e.n;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float x = param[i];
    const float g = DECAY ? sign * grad[i] + decay * x : sign * grad[i];
    const float m = (near_average ? exp_avg[i] : g) + weight * (g - exp_avg[i]);
    const float old = beta2 * exp_inf[i], now = __builtin_fabsf(g) + eps;
    const float u = (old > now) | (old != old) ? old : now;  // NaN in either stays
    exp_avg[i] = m;
    exp_inf[i] = u;
    param[i] = x + size * m / u;
  }
}

void update(const Elements& e, const Step& step) {
  if (step.decay != 0.0f) return update_of<true>(e, step);
  update_of<false>(e, step);
}
