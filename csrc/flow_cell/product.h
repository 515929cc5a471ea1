// Products of small matrices, the result one or a few vectors wide. A is addressed by (row stride am, column stride ak): am = 1
// gives a transpose without a copy, and rows may overlap.
#pragma once
#include "common/simd.h"

namespace nvae::NVAE_ISA::flow {

constexpr int P = 8;  // rows (pixels) in registers, one vector each

// C [R][NV L] = A B, or += A B: the sum over k starts from zero either way, because long sums round more.
template <int R, int NV>
NVAE_ALWAYS void micro(int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C, int64_t ldc,
                       bool add) {
  vf c[R][NV] = {};
  for (int64_t k = 0; k < K; k++) {
    vf b[NV];
    NVAE_UNROLL for (int j = 0; j < NV; j++) b[j] = load(B + k * ldb + j * L);
    NVAE_UNROLL for (int i = 0; i < R; i++) {
      const vf a = splat(A[i * am + k * ak]);
      NVAE_UNROLL for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
    }
  }
  NVAE_UNROLL for (int i = 0; i < R; i++)
    NVAE_UNROLL for (int j = 0; j < NV; j++) store(C + i * ldc + j * L, add ? load(C + i * ldc + j * L) + c[i][j] : c[i][j]);
}

template <int R, int NV>
NVAE_ALWAYS void product_rows(int64_t M, int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb,
                              float* C, int64_t ldc, bool add) {
  int64_t m = 0;
  for (; m + R <= M; m += R) micro<R, NV>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
  if (m + R / 2 <= M) {
    micro<R / 2, NV>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
    m += R / 2;
  }
  for (; m < M; m++) micro<1, NV>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
}

// C [M][L] (+)= A B, one vector wide.
inline void product(int64_t M, int64_t K, const float* A, int64_t am, int64_t ak, const float* B, float* C, bool add) {
  product_rows<P, 1>(M, K, A, am, ak, B, L, C, L, add);
}
// C [M][nv L] += A B with B [K][nv L]; rows of A are am apart.
inline void add_product(int nv, int64_t M, int64_t K, const float* A, int64_t am, const float* B, float* C) {
  const int64_t ld = (int64_t)nv * L;
  int v = 0;
  for (; v + 2 <= nv; v += 2) product_rows<L == 16 ? P : P / 2, 2>(M, K, A, am, 1, B + v * L, ld, C + v * L, ld, true);
  if (v < nv) product_rows<P, 1>(M, K, A, am, 1, B + v * L, ld, C + v * L, ld, true);
}

}  // namespace nvae::NVAE_ISA::flow
