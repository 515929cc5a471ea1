// One vector of floats, as wide as the instruction set that this translation unit is compiled for (csrc/cpu/<set>.cpp defines
// NVAE_AVX2, NVAE_AVX512): 16 lanes with AVX-512, else 8
// (AVX2; two NEON or SSE registers). GCC and Clang vector extensions, so that the same kernels build everywhere.
//
// Included by the files that csrc/cpu/ compiles once per instruction set, inside namespace nvae::NVAE_ISA: nothing here may be
// shared between them, and nothing of the standard library may be called (its weak symbols, compiled for AVX-512, could be
// linked into the baseline path and stop an old CPU).
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define NVAE_ALWAYS inline __attribute__((always_inline))
#if defined(__clang__)
#define NVAE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NVAE_UNROLL _Pragma("GCC unroll 64")
#endif

namespace nvae::NVAE_ISA {

#if defined(NVAE_AVX512)
constexpr int L = 16;
#else
constexpr int L = 8;
#endif

typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef uint16_t vh __attribute__((vector_size(L * 2)));
typedef float vf_any __attribute__((vector_size(L * 4), aligned(4), may_alias));  // in memory, at any address
typedef uint16_t vh_any __attribute__((vector_size(L * 2), aligned(2), may_alias));

using bf16 = uint16_t;

NVAE_ALWAYS vf splat(float x) { return x - vf{}; }

NVAE_ALWAYS vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
NVAE_ALWAYS vh narrow(vf x) {  // round to nearest even; NaN stays NaN
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vi nan = x != x;
  return __builtin_convertvector(nan ? (vu)((u >> 16) | 0x40u) : rounded, vh);
}

NVAE_ALWAYS vf load(const float* p) { return *(const vf_any*)p; }
NVAE_ALWAYS vf load(const bf16* p) { return widen(*(const vh_any*)p); }
NVAE_ALWAYS void store(float* p, vf x) { *(vf_any*)p = x; }
NVAE_ALWAYS void store(bf16* p, vf x) { *(vh_any*)p = narrow(x); }

// The first n of L lanes; the others load as zero and are not stored.
template <typename T>
NVAE_ALWAYS vf load_n(const T* p, int n) {
  if (n >= L) return load(p);
#if defined(NVAE_AVX512)
  const __mmask16 lanes = (__mmask16)((1u << n) - 1u);
  if constexpr (sizeof(T) == 4)
    return (vf)_mm512_maskz_loadu_ps(lanes, p);
  else
    return widen((vh)_mm256_maskz_loadu_epi16(lanes, p));
#else
  alignas(64) T lanes[L] = {};
  for (int i = 0; i < n; i++) lanes[i] = p[i];
  return load(lanes);
#endif
}
template <typename T>
NVAE_ALWAYS void store_n(T* p, vf x, int n) {
  if (n >= L) return store(p, x);
#if defined(NVAE_AVX512)
  const __mmask16 mask = (__mmask16)((1u << n) - 1u);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, mask, (__m512)x);
  else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(x));
#else
  alignas(64) T lanes[L];
  store(lanes, x);
  for (int i = 0; i < n; i++) p[i] = lanes[i];
#endif
}

// Store past the caches, without reading the line first: p on a multiple of the vector's size.
NVAE_ALWAYS void stream(float* p, vf x) {
#if defined(NVAE_AVX512)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(NVAE_AVX2)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}
NVAE_ALWAYS void stream(bf16* p, vf x) { store(p, x); }
// Whether to store that way rows of `width` values of p, `elements` in all: it pays above the size of the second-level cache, and
// needs whole aligned lines.
template <typename T>
inline bool may_stream(const T* p, int64_t width, int64_t elements) {
  return sizeof(T) == 4 && width % L == 0 && (uintptr_t)p % (L * 4) == 0 && elements > (1 << 18);
}
// Before another thread may read what was streamed.
NVAE_ALWAYS void stream_fence() {
#if defined(NVAE_AVX2)
  _mm_sfence();
#endif
}

// 1 / x for 1 <= x < 3e38: an estimate and a Newton step, about 1 ulp.
NVAE_ALWAYS vf recip(vf x) {
#if defined(NVAE_AVX512)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

NVAE_ALWAYS vf select(vi condition, vf a, vf b) { return condition ? a : b; }
NVAE_ALWAYS vf vmax(vf a, float b) {  // NaN in a stays
#if defined(NVAE_AVX512)
  return (vf)_mm512_max_ps(_mm512_set1_ps(b), (__m512)a);
#else
  return a < b ? splat(b) : a;
#endif
}
NVAE_ALWAYS vf vmin(vf a, float b) {
#if defined(NVAE_AVX512)
  return (vf)_mm512_min_ps(_mm512_set1_ps(b), (__m512)a);
#else
  return a > b ? splat(b) : a;
#endif
}

// exp: Cody-Waite reduction, degree-5 polynomial, 1.1e-7 relative; 0 below -104, overflows to about 6e37 at 87.
NVAE_ALWAYS vf exp_(vf x) {
  x = vmax(vmin(x, 87.0f), -87.0f);
  vf m = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer by a magic sum
  vf f = m - 12582912.0f;
  vf r = x - f * 0.693359375f;
  r = r + f * 2.12194440e-4f;
  vf p = splat(8.3120496396e-3f);
  p = p * r + 4.1894500173e-2f;
  p = p * r + 1.6667133219e-1f;
  p = p * r + 4.9999201752e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(NVAE_AVX512)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)f);
#else
  return (vf)((vi)p + ((vi)m << 23));
#endif
}
NVAE_ALWAYS vf sigmoid(vf u) { return recip(1.0f + exp_(-u)); }

NVAE_ALWAYS float sum(vf x) {
  float s = 0;
  for (int i = 0; i < L; i++) s += x[i];
  return s;
}

}  // namespace nvae::NVAE_ISA
