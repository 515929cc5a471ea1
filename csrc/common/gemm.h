// Register-blocked float micro-kernel: C[m][0 : NV L] (+)= sum_k A(m, k) B[k][0 : NV L].
// A is addressed by (row stride am, k stride ak): am = 1 gives the transpose of A without a copy. B is a packed panel.
#pragma once
#include "common/simd.h"

namespace nvae::NVAE_ISA {

template <int MR, int NV>
NVAE_ALWAYS void micro(int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C, int64_t ldc,
                       bool add) {
  vf c[MR][NV];
  NVAE_UNROLL for (int i = 0; i < MR; i++)
    NVAE_UNROLL for (int j = 0; j < NV; j++) c[i][j] = add ? load(C + i * ldc + j * L) : vf{};
  for (int64_t k = 0; k < K; k++) {
    vf b[NV];
    NVAE_UNROLL for (int j = 0; j < NV; j++) b[j] = load(B + k * ldb + j * L);
    NVAE_UNROLL for (int i = 0; i < MR; i++) {
      const vf a = splat(A[i * am + k * ak]);
      NVAE_UNROLL for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
    }
  }
  NVAE_UNROLL for (int i = 0; i < MR; i++)
    NVAE_UNROLL for (int j = 0; j < NV; j++) store(C + i * ldc + j * L, c[i][j]);
}

#if defined(__AVX512F__)
constexpr int MR = 8;  // 8 x 3 vectors: 24 of 32 registers
#else
constexpr int MR = 4;  // 4 x 3: 12 of 16
#endif
constexpr int NR = 3;
constexpr int PANEL = NR * L;  // columns of a packed panel

template <int NV>
void gemm_vectors(int64_t M, int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C, int64_t ldc,
                  bool add) {
  int64_t m = 0;
  for (; m + MR <= M; m += MR) micro<MR, NV>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
  for (; m < M; m++) micro<1, NV>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
}

// One panel of nv vectors (1 to NR).
inline void gemm_panel(int nv, int64_t M, int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C,
                       int64_t ldc, bool add) {
  if (nv == 3) return gemm_vectors<3>(M, K, A, am, ak, B, ldb, C, ldc, add);
  if (nv == 2) return gemm_vectors<2>(M, K, A, am, ak, B, ldb, C, ldc, add);
  gemm_vectors<1>(M, K, A, am, ak, B, ldb, C, ldc, add);
}

}  // namespace nvae::NVAE_ISA
