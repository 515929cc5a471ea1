// In the place of csrc/depthwise_conv/depthwise_cuda_instructions.cuh: the meaning of its instructions as the PTX ISA gives it.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvae::depthwise_conv::cuda {

// 11 bits of it: as far off as tanh.approx may be.
inline float tanh_approximate(float x) { return __uint_as_float(__float_as_uint(std::tanh(x)) & 0xffffe000u); }

template <int N, bool TRANSPOSED>
void load_any(uint32_t (&r)[N], uint32_t address) {
  const uint32_t mine[1] = {address};
  uint32_t all[32][1];
  emulator::gather(mine, all);
  const int lane = emulator::current & 31;
  for (int i = 0; i < N; i++)
    for (int j = 0; j < 2; j++) {
      const int row = TRANSPOSED ? lane % 4 * 2 + j : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + j;
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * j, shared + all[8 * i + row][0] + column * 2, 2);
    }
  emulator::wait(emulator::kWarp);  // no lane goes on to write before all have read
}
template <int N>
void load_matrices(uint32_t (&r)[N], uint32_t address) {
  load_any<N, false>(r, address);
}
template <int N>
void load_transposed(uint32_t (&r)[N], uint32_t address) {
  load_any<N, true>(r, address);
}

template <typename T>
float half_of(uint32_t word, int which) {
  T half;
  const uint16_t bits = word >> (16 * which);
  std::memcpy(&half, &bits, 2);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(half);
  else
    return __bfloat162float(half);
}
template <typename T, int N>
void multiply_add_words(float (&d)[4], const uint32_t (&a)[N], const uint32_t (&b)[N / 2]) {
  uint32_t as[32][N], bs[32][N / 2];
  emulator::gather(a, as);
  emulator::gather(b, bs);
  const int g = (emulator::current & 31) / 4, q = emulator::current & 3;
  for (int low = 0; low < 2; low++)  // rows g and g + 8
    for (int j = 0; j < 2; j++) {
      float sum = d[2 * low + j];
      for (int k = 0; k < 4 * N; k++) {
        const int pair = k % 8 / 2, block = k / 8, n = 2 * q + j;
        sum += half_of<T>(as[g * 4 + pair][2 * block + low], k & 1) * half_of<T>(bs[n * 4 + pair][block], k & 1);
      }
      d[2 * low + j] = sum;
    }
}
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  multiply_add_words<T>(d, a, b);
}
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[2], uint32_t b0) {
  const uint32_t b[1] = {b0};
  multiply_add_words<T>(d, a, b);
}

}  // namespace nvae::depthwise_conv::cuda
