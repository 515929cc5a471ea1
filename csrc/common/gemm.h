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
    NVAE_UNROLL for (int j = 0; j < NV; j++) c[i][j] = vf{};
  for (int64_t k = 0; k < K; k++) {
    vf b[NV];
    NVAE_UNROLL for (int j = 0; j < NV; j++) b[j] = load(B + k * ldb + j * L);
    NVAE_UNROLL for (int i = 0; i < MR; i++) {
      const vf a = splat(A[i * am + k * ak]);
      NVAE_UNROLL for (int j = 0; j < NV; j++) c[i][j] += a * b[j];
    }
  }
  NVAE_UNROLL for (int i = 0; i < MR; i++)
    NVAE_UNROLL for (int j = 0; j < NV; j++) {
      float* p = C + i * ldc + j * L;
      store(p, add ? load(p) + c[i][j] : c[i][j]);
    }
}

#if defined(NVAE_AVX512)
constexpr int MR = 8;  // 8 x 3 vectors: 24 of 32 registers
#else
constexpr int MR = 4;  // 4 x 3: 12 of 16
#endif
constexpr int NR = 3;
constexpr int64_t kTerms = 128;  // products that are summed apart: rounding grows with a block and the number of blocks, not with K
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
  const auto run = nv == 3 ? gemm_vectors<3> : nv == 2 ? gemm_vectors<2> : gemm_vectors<1>;
  int64_t k = 0;
  do {  // once for K = 0 too: C is written
    run(M, K - k < kTerms ? K - k : kTerms, A + k * ak, am, ak, B + k * ldb, ldb, C, ldc, add || k > 0);
    k += kTerms;
  } while (k < K);
}

}  // namespace nvae::NVAE_ISA
