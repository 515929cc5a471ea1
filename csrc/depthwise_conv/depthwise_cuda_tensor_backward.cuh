// Backward 5 x 5 at stride 1 on the tensor cores, 16-bit storage: both gradients in one kernel, in the formulas of core_backward.
//
// A block of 8 warps stages 20 x 20 pixels of g and the 16 x 16 of x that they belong to, 64 channels each; a warp owns 8 channels,
// chunk `warp` of every pixel, and takes one gradient after the other, whose accumulators would not fit beside each other.
//
// dw, where two taps are a multiplication of 16 rows (8 channels of g under each), 8 columns (channels of a) and depth 16 (pixels):
//   D[channel of g, channel of a] += sum over 16 pixels of g^T[channel, pixel shifted by the tap] a[pixel, channel].
// Only the diagonals of its two 8 x 8 blocks are wanted, so that nothing that is not finite leaves its channel. 13 of them a row of
// x, from three operands a row of g: taps 0 and 1, 2 and 3 of a row of the filter, and tap 4 of two rows. a is made of x in the
// registers of the operand, where a lane has one channel, and rounded to storage. Sums over tiles stand in shared memory.
//
// da is the forward's map on g with the filter turned by 180 degrees. Its lane makes act'(u) of x again and puts du in its place.
// 128 registers are just enough: what lives from tile to tile, sum(du) and sum(du (x - mean)) too, is in shared memory meanwhile.
#pragma once
#include "depthwise_conv/depthwise_cuda_tensor.cuh"

namespace nvae::depthwise_conv::cuda {

constexpr int kInnerRow = row_bytes(kTensorTile), kTensorParts = 27;  // dw, sum(du), sum(du (x - mean))
constexpr int kTensorBackwardBytes =
    tile_bytes(kTensorSide) + tile_bytes(kTensorTile) + kTensorParts * kPixelBytes * 2 + kTensorThreads * 16;

// Adds the tile's weight gradient of the warp's channels to total [25][W]. scale, shift: of channel lane / 4.
template <typename T, int W>
__device__ __forceinline__ void add_weight_gradient(const unsigned char* tile, const unsigned char* inner, int warp, float scale,
                                                    float shift, int act, int rows, int columns, float* total) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, pixel = (lane & 7) + (lane >> 4) * 8, second = lane >> 3 & 1;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  const uint32_t from01 = base + chunk_offset(0, pixel + second, warp), from23 = base + chunk_offset(0, pixel + 2 + second, warp);
  const uint32_t from4 = base + chunk_offset(second, pixel + 4, warp);
  const uint32_t from_x = static_cast<uint32_t>(__cvta_generic_to_shared(inner)) + chunk_offset<kInnerRow>(0, lane & 15, warp);
  uint32_t inside[2];  // beyond the image act(shift) is not 0, and g is not either
#pragma unroll
  for (int i = 0; i < 2; i++) inside[i] = columns - 2 * q - 8 * i >= 2 ? ~0u : columns - 2 * q - 8 * i == 1 ? 0xffffu : 0u;

  float acc[13][4] = {};
  uint32_t a[5][2];
#pragma unroll
  for (int r = 0; r < kTensorSide; r++) {
    if (ends_before(r, rows)) break;
    uint32_t g01[4], g23[4], g4[4];  // g4: of rows r and r + 1, the latter not wanted where there is none
    load_transposed(g01, from01 + r * kTensorRow);
    load_transposed(g23, from23 + r * kTensorRow);
    load_transposed(g4, (r == kTensorSide - 1 ? from4 - second * kTensorRow : from4) + r * kTensorRow);
    if (r < kTensorTile) {
      uint32_t(&here)[2] = a[r % 5];
      load_transposed(here, from_x + r * kInnerRow);
      float u[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float v[2];
        unpack(here[i], v, T());
#pragma unroll
        for (int j = 0; j < 2; j++) u[2 * i + j] = fmaf(v[j], scale, shift);
      }
      activate_scaled<T>(u, act);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float v[2] = {u[2 * i], u[2 * i + 1]};
        here[i] = r < rows ? pack(v, T()) & inside[i] : 0u;
      }
    }
    // Staged row r lies m rows below row r - m of x.
#pragma unroll
    for (int m = 0; m < 5; m++)
      if (r - m >= 0 && r - m < kTensorTile) multiply_add<T>(acc[m], g01, a[(r - m) % 5][0], a[(r - m) % 5][1]);
#pragma unroll
    for (int m = 0; m < 5; m++)
      if (r - m >= 0 && r - m < kTensorTile) multiply_add<T>(acc[5 + m], g23, a[(r - m) % 5][0], a[(r - m) % 5][1]);
#pragma unroll
    for (int m = 0; m < 5; m += 2)
      if (r - m >= 0 && r - m < kTensorTile) multiply_add<T>(acc[10 + m / 2], g4, a[(r - m) % 5][0], a[(r - m) % 5][1]);
  }
  if (q != g >> 1) return;  // the lane has row g, columns 2 q and 2 q + 1 of both blocks
#pragma unroll
  for (int i = 0; i < 13; i++)
#pragma unroll
    for (int block = 0; block < 2; block++) {
      const int t = i < 10 ? i % 5 * 5 + i / 5 * 2 + block : (2 * (i - 10) + block) * 5 + 4;  // rows and columns of g's shift
      if (t < 25) total[tap<true>(t) * W + warp * 8 + g] += g & 1 ? acc[i][2 * block + 1] : acc[i][2 * block];
    }
}

template <typename T>
__global__ __launch_bounds__(kTensorThreads, 2) void tensor_backward(Problem p, Backward f, Split split) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const tile = shared;
  unsigned char* const inner = tile + tile_bytes(kTensorSide);  // x, then du
  constexpr int W = kChannels<T>;
  float* const total = reinterpret_cast<float*>(inner + tile_bytes(kTensorTile));  // [kTensorParts][W]
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), c = static_cast<int>(p.c);
  const int c0 = blockIdx.x * W, g = lane >> 2, q = lane & 3, channel = c0 + warp * 8;
  const bool warp_on = channel < c;
  const T* const weight = static_cast<const T*>(f.weight) + static_cast<int64_t>(warp_on ? channel : c0) * 25;
  unsigned char* const x_at[2] = {inner + chunk_offset<kInnerRow>(0, g, warp) + q * 4,
                                  inner + chunk_offset<kInnerRow>(0, g + 8, warp) + q * 4};

  for (int i = threadIdx.x; i < kTensorParts * W; i += kTensorThreads) total[i] = 0.0f;
  float4* const sums = reinterpret_cast<float4*>(total + kTensorParts * W) + threadIdx.x;  // of du, and of du (x - mean)
  *sums = {};
  const int tiles = tiles_of_block(split);
#pragma unroll 1
  for (int index = 0; index < tiles; index++) {
    const Place at = place(split, index, p.h, p.w, kTensorTile);
    const int64_t image = at.image * p.h * p.w * c;
    const int rows = min(kTensorTile, p.h - at.y), columns = min(kTensorTile, p.w - at.x);
    const T* const dy = static_cast<const T*>(f.dy) + image;
    Finite<T> finite;
    const auto see = [&](const uint32_t(&v)[4]) {
#pragma unroll
      for (int i = 0; i < 4; i++) finite.see(v[i]);
    };
    const Plain<T> x{{static_cast<const T*>(f.x) + image}};
    fill<T, kTensorTile, kTensorThreads, true>(inner, x, at.y, at.x, p.h, p.w, c, c0, [](const uint32_t(&)[4]) {});
    if (f.c) {
      const Gradient<T> source{{dy, static_cast<const T*>(f.y) + image}, f.c};
      fill<T, kTensorSide, kTensorThreads, true>(tile, source, at.y - 2, at.x - 2, p.h, p.w, c, c0, see);
    } else {
      fill<T, kTensorSide, kTensorThreads, true>(tile, Plain<T>{{dy}}, at.y - 2, at.x - 2, p.h, p.w, c, c0, see);
    }
    const bool ordinary = !__syncthreads_or(!finite.all());
    if (warp_on) {
      {
        float scale[1], shift[1];
        table_row(f.bn, bn_act::kScale, c, channel + g, 1.0f, scale);
        table_row(f.bn, bn_act::kShift, c, channel + g, 0.0f, shift);
        const float half = scale_for<T>(p.act);
        add_weight_gradient<T, W>(tile, inner, warp, scale[0] * half, shift[0] * half, p.act, rows, columns, total);
      }
      __syncwarp();
      float scale[2], shift[2], mean[2];
      table_row(f.bn, bn_act::kScale, c, channel + 2 * q, 1.0f, scale);
      table_row(f.bn, bn_act::kShift, c, channel + 2 * q, 0.0f, shift);
      table_row(f.bn, bn_act::kMean, c, channel + 2 * q, 0.0f, mean);
      const uint32_t inside[2] = {g < columns ? ~0u : 0u, g + 8 < columns ? ~0u : 0u};
      float s1[2] = {sums->x, sums->y}, s2[2] = {sums->z, sums->w};
      const auto finish = [&](int o, const float(&d)[4]) {
        float u[4], slope[4], value[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float v[2];
          unpack(*reinterpret_cast<const uint32_t*>(x_at[half] + o * kInnerRow), v, T());
#pragma unroll
          for (int j = 0; j < 2; j++) value[2 * half + j] = v[j], u[2 * half + j] = fmaf(v[j], scale[j], shift[j]);
        }
        activate_both<T>(u, slope, p.act);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          float v[2] = {d[2 * half] * slope[2 * half], d[2 * half + 1] * slope[2 * half + 1]};
          // Not `o < rows ?`: 16 predicates would wait in registers from dw's loop on.
          const uint32_t word = pack(v, T()) & inside[half] & static_cast<uint32_t>((o - rows) >> 31);
          *reinterpret_cast<uint32_t*>(x_at[half] + o * kInnerRow) = word;
          unpack(word, v, T());
#pragma unroll
          for (int j = 0; j < 2; j++) s1[j] += v[j], s2[j] = fmaf(v[j], value[2 * half + j] - mean[j], s2[j]);
        }
      };
      if (ordinary) {
        uint32_t taps[25];
        load_diagonals<true>(taps, weight);
        convolve<T>(tile, taps, warp, rows, finish);
      } else {
        convolve_by_taps<T, true>(tile, weight, warp, rows, finish);
      }
      *sums = {s1[0], s1[1], s2[0], s2[1]};
    }
    __syncthreads();
    store_tile<T, kInnerRow>(inner, static_cast<T*>(f.du) + image, at, rows, columns, p.w, c, c0);
    __syncthreads();
  }

  // The warp owns its channels: its pixels are 4 lanes apart.
  float s1[2] = {sums->x, sums->y}, s2[2] = {sums->z, sums->w};
#pragma unroll
  for (int step = 4; step < 32; step *= 2)
#pragma unroll
    for (int j = 0; j < 2; j++) s1[j] += __shfl_xor_sync(~0u, s1[j], step), s2[j] += __shfl_xor_sync(~0u, s2[j], step);
  if (g == 0) {
#pragma unroll
    for (int j = 0; j < 2; j++) total[25 * W + warp * 8 + 2 * q + j] = s1[j], total[26 * W + warp * 8 + 2 * q + j] = s2[j];
  }
  __syncthreads();
  float* part = part_of<W>(f.scratch, split, kTensorParts, blockIdx.y);
  for (int i = threadIdx.x; i < kTensorParts * W; i += kTensorThreads) part[i] = total[i];
  join_gradients<T, W, kTensorThreads>(p, f, split, 25, tile);
}

}  // namespace nvae::depthwise_conv::cuda
