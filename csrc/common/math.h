// Branch-free float functions that the compiler can vectorise. NaN comes out where NaN went in, but for log_positive.
#pragma once
#include <cstdint>

#define NVAE_INLINE static inline __attribute__((always_inline))

namespace nvae {

NVAE_INLINE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
NVAE_INLINE float float_of(uint32_t u) { return __builtin_bit_cast(float, u); }

// An exponential as scale * (1 + p): scale is a power of two, p = expm1 of a remainder within ln2 / 2 of 0.
struct Exp {
  float scale, p;
};

// x * inverse_step rounded to an integer n, which stands in the low bits of `shifted` (the addend is 1.5 * 2^23).
struct Rounded {
  float shifted, n;
};

NVAE_INLINE Rounded round_to_step(float x, float inverse_step) {
  const float shifted = x * inverse_step + 12582912.0f;
  return {shifted, shifted - 12582912.0f};
}

// exp(n ln2 + r), |n| <= 126. The polynomial is a minimax fit, relative error 1.3e-8 of p.
NVAE_INLINE Exp exp_reduced(Rounded n, float r) {
  float c = 1.3882512e-3f;
  c = c * r + 8.366521e-3f;
  c = c * r + 4.16672e-2f;
  c = c * r + 1.6666543e-1f;
  c = c * r + 4.9999997e-1f;
  return {float_of((bits_of(n.shifted) << 23) + 0x3f800000u), r + r * r * c};
}

// exp(y), |y| <= 80.
NVAE_INLINE Exp exp_parts(float y) {
  const Rounded n = round_to_step(y, 1.44269504f);
  return exp_reduced(n, (y - n.n * 0.693359375f) + n.n * 2.12194440e-4f);
}

NVAE_INLINE float exp_of(Exp e) { return e.scale + e.scale * e.p; }
NVAE_INLINE float expm1_of(Exp e) { return e.scale * e.p + (e.scale - 1.0f); }

// Natural logarithm of a positive normal number; < 1 ulp (fdlibm's reduction and coefficients).
NVAE_INLINE float log_positive(float x) {
  const uint32_t u = bits_of(x);
  const int32_t k = static_cast<int32_t>(u - 0x3f3504f3u) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const float f = float_of(u - (static_cast<uint32_t>(k) << 23)) - 1.0f;
  const float s = f / (2.0f + f), z = s * s, w = z * z;
  const float series = z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const float half = 0.5f * f * f, n = static_cast<float>(k);
  return s * (half + series) + n * 9.0580006145e-6f - half + f + n * 6.9313812256e-1f;
}

}  // namespace nvae
