// Per-channel sums over the rows of dense [rows][channels] tiles, and how the partial sums of tasks are joined. A task's sums are
// taken in the order of its rows, tasks are joined in their order: the same bits for any number of threads.
#pragma once
#include "common/simd.h"

namespace nvae::NVAE_ISA {

template <int N>
struct Int {
  static constexpr int value = N;
};

// f(c, n, NV): channels from c on, in blocks of NV = 4 vectors, then single vectors, of which the last may hold n < L channels.
template <typename F>
NVAE_ALWAYS void for_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) f(c, L, Int<4>{});
  for (; c + L <= channels; c += L) f(c, L, Int<1>{});
  if (c < channels) f(c, (int)(channels - c), Int<1>{});
}

// Moves the pivot of s1 = sum(x - pivot), s2 = sum((x - pivot)^2) over `count` values to their mean: a pivot that lies several
// deviations off would have the square of that distance cancel again in the variance.
NVAE_ALWAYS void centre(vf& pivot, vf& s1, vf& s2, float count) {
  const vf next = pivot + s1 * (1.0f / count), d = next - pivot;
  s2 -= d * (2.0f * s1 - count * d);
  s1 -= count * d;
  pivot = next;
}

// Adds a tile to stats [3][channels] = pivot, sum(x - pivot), sum((x - pivot)^2) over the `seen` rows before it. The pivot is the
// mean of the first rows, then of all that were seen after 1, 2, 4, ... tiles (of 2^i rows).
template <typename T>
NVAE_ALWAYS void add_stats(const T* tile, int64_t ld, int64_t rows, int64_t width, float* stats, int64_t channels, int64_t seen) {
  for_channels(width, [&](int64_t c, int n, auto vectors) __attribute__((always_inline)) {
    constexpr int NV = decltype(vectors)::value, U = NV == 1 ? 4 : 1;  // sums side by side
    float *pivot = stats + c, *sum = pivot + channels, *square = sum + channels;
    vf p[NV], s1[NV][U], s2[NV][U];
    NVAE_UNROLL for (int v = 0; v < NV; v++) {
      NVAE_UNROLL for (int u = 0; u < U; u++) s1[v][u] = s2[v][u] = vf{};
      p[v] = vf{};
      if (!seen) continue;
      p[v] = load_n(pivot + v * L, n);
      if (seen & (seen - 1)) continue;  // after 1, 2, 4, ... tiles
      vf t1 = load_n(sum + v * L, n), t2 = load_n(square + v * L, n);
      centre(p[v], t1, t2, (float)seen);
      store_n(sum + v * L, t1, n);
      store_n(square + v * L, t2, n);
    }
    if (!seen) {
      const int64_t some = rows < 8 ? rows : 8;
      for (int64_t m = 0; m < some; m++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) p[v] += load_n(tile + m * ld + c + v * L, n);
      NVAE_UNROLL for (int v = 0; v < NV; v++) p[v] *= 1.0f / (float)some;
    }
    NVAE_UNROLL for (int v = 0; v < NV; v++) store_n(pivot + v * L, p[v], n);
    int64_t m = 0;
    for (; m + U <= rows; m += U)
      NVAE_UNROLL for (int u = 0; u < U; u++)
        NVAE_UNROLL for (int v = 0; v < NV; v++) {
          const vf e = load_n(tile + (m + u) * ld + c + v * L, n) - p[v];
          s1[v][u] += e;
          s2[v][u] += e * e;
        }
    for (; m < rows; m++)
      NVAE_UNROLL for (int v = 0; v < NV; v++) {
        const vf e = load_n(tile + m * ld + c + v * L, n) - p[v];
        s1[v][0] += e;
        s2[v][0] += e * e;
      }
    NVAE_UNROLL for (int v = 0; v < NV; v++) {
      NVAE_UNROLL for (int u = 1; u < U; u++) s1[v][0] += s1[v][u], s2[v][0] += s2[v][u];
      if (seen) s1[v][0] += load_n(sum + v * L, n), s2[v][0] += load_n(square + v * L, n);
      store_n(sum + v * L, s1[v][0], n);
      store_n(square + v * L, s2[v][0], n);
    }
  });
}

// mean and biased variance, out [2][channels], of parts [parts][3][channels] as add_stats leaves them; part i saw `rows` values,
// the last one `last` (Chan et al. 1983, in double).
inline void join_stats(const float* parts, int64_t count, int64_t channels, double rows, double last, float* out) {
  constexpr int B = 64;
  for (int64_t c = 0; c < channels; c += B) {
    const int n = (int)(channels - c < B ? channels - c : B);
    double mean[B] = {}, m2[B] = {}, total = 0;
    for (int64_t i = 0; i < count; i++) {
      const float *pivot = parts + i * 3 * channels + c, *sum = pivot + channels, *square = sum + channels;
      const double k = i + 1 < count ? rows : last, inverse = 1.0 / k, share = k / (total + k), weight = total * share;
      for (int j = 0; j < n; j++) {
        const double s = sum[j], shift = s * inverse, d = (double)pivot[j] + shift - mean[j];
        mean[j] += d * share;
        m2[j] += (double)square[j] - s * shift + d * d * weight;
      }
      total += k;
    }
    for (int j = 0; j < n; j++) {
      const double var = m2[j] / total;
      out[c + j] = (float)mean[j];
      out[channels + c + j] = (float)(var < 0 ? 0 : var);
    }
  }
}

// out[i] = sum of parts[k][i] over k in order, for begin <= i < end, in double.
inline void join_sums(const float* parts, int64_t count, int64_t width, int64_t begin, int64_t end, float* out) {
  constexpr int B = 64;
  for (int64_t c = begin; c < end; c += B) {
    const int n = (int)(end - c < B ? end - c : B);
    double s[B] = {};
    for (int64_t k = 0; k < count; k++)
      for (int j = 0; j < n; j++) s[j] += parts[k * width + c + j];
    for (int j = 0; j < n; j++) out[c + j] = (float)s[j];
  }
}

}  // namespace nvae::NVAE_ISA
