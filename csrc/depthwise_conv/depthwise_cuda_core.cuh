// Dense kernels of 3 x 3 and 5 x 5 at stride 1 on the CUDA cores. A block owns 128 bytes of channels and walks over tiles of TILE x
// TILE outputs; a lane owns a word of channels, a warp some columns.
#pragma once
#include "depthwise_conv/depthwise_cuda_join.cuh"
#include "depthwise_conv/depthwise_cuda_tile.cuh"

namespace nvae::depthwise_conv::cuda {

constexpr int kCoreThreads = 128, kCoreBlocks = 3;  // of a multiprocessor: 168 registers

// The warp slides down its columns of the staged tile: a pixel is read from shared memory once and used for K x K taps, K rows of
// outputs being under way at a time. Unrolled whole, so that the row of an accumulator is known when compiled.
template <typename T, int K, int TILE>
__global__ __launch_bounds__(kCoreThreads, kCoreBlocks) void core_forward(Problem p, Forward f, Split split) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const tile = shared;
  constexpr int V = kWord<T>, kSide = TILE + K - 1, kColumns = TILE / (kCoreThreads / 32), kRow = row_bytes(kSide);
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), c = static_cast<int>(p.c);
  const int c0 = blockIdx.x * kChannels<T>, channel = c0 + V * lane, first_column = warp * kColumns;
  const bool lane_on = channel < c;
  const T* weight = static_cast<const T*>(f.weight) + (lane_on ? channel : c0) * static_cast<int64_t>(K * K);

  float k[K * K][V];
#pragma unroll
  for (int t = 0; t < K * K; t++)
#pragma unroll
    for (int j = 0; j < V; j++) k[t][j] = widen(weight[j * K * K + t]);

  Moments<V> moments;
  const int tiles = tiles_of_block(split);
#pragma unroll 1
  for (int index = 0; index < tiles; index++) {
    const Place at = place(split, index, p.h, p.w, TILE);
    const int64_t image = at.image * p.h * p.w * c;
    const int rows = min(TILE, p.h - at.y), columns = lane_on ? max(0, min(kColumns, p.w - at.x - first_column)) : 0;
    const Activated<T> source{{static_cast<const T*>(f.x) + image}, f.bn, p.act};
    fill<T, kSide, kCoreThreads, false>(tile, source, at.y - K / 2, at.x - K / 2, p.h, p.w, c, c0, [](const uint32_t (&)[4]) {});
    __syncthreads();

    float acc[K][kColumns][V];
#pragma unroll
    for (int s = 0; s < K; s++)
#pragma unroll
      for (int i = 0; i < kColumns; i++)
#pragma unroll
        for (int j = 0; j < V; j++) acc[s][i][j] = 0.0f;
    const unsigned char* in = tile + first_column * kPixelBytes + lane * 4;
    T* out = static_cast<T*>(f.y) + image + (at.y * p.w + at.x + first_column) * c + channel;
#pragma unroll
    for (int r = 0; r < kSide; r++) {
      float a[kColumns + K - 1][V];
#pragma unroll
      for (int i = 0; i < kColumns + K - 1; i++)
        unpack(*reinterpret_cast<const uint32_t*>(in + r * kRow + i * kPixelBytes), a[i], T());
#pragma unroll
      for (int m = 0; m < K; m++)
        if (r - m >= 0 && r - m < TILE) {
#pragma unroll
          for (int n = 0; n < K; n++)
#pragma unroll
            for (int i = 0; i < kColumns; i++)
#pragma unroll
              for (int j = 0; j < V; j++)
                acc[(r - m) % K][i][j] = fmaf(a[i + n][j], k[m * K + n][j], acc[(r - m) % K][i][j]);
        }
      if (r < K - 1) continue;
      const int o = r - (K - 1);
#pragma unroll
      for (int i = 0; i < kColumns; i++) {
        float(&d)[V] = acc[o % K][i];
        const bool on = o < rows && i < columns;
        const uint32_t word = pack(d, T());
        if (on) *reinterpret_cast<uint32_t*>(out + i * c) = word;
        unpack(word, d, T());
        moments.add(d, on);
#pragma unroll
        for (int j = 0; j < V; j++) d[j] = 0.0f;
      }
      out += static_cast<int64_t>(p.w) * c;
      if ((o == 0 || o == 3) && index == 0) {
        moments.count = static_cast<float>(min(o + 1, rows) * columns);
        moments.centre();
      }
    }
    moments.count += static_cast<float>((index == 0 ? max(rows - 4, 0) : rows) * columns);
    moments.centre();
    __syncthreads();
  }
  if (f.stats == nullptr) return;
  join_warps<V, kCoreThreads>(moments, reinterpret_cast<float*>(tile));
  if (warp == 0) moments.write(part_of<32 * V>(f.scratch, split, 3, blockIdx.y), 32 * V, V * lane);
  join_moments<32 * V, kCoreThreads>(p, f, split, tile);
}

// Both gradients from one staged tile of g: with a = act(u) of a pixel of x, which no halo is needed of,
//   da[i, j] = sum w[m, n] g[i + p - m, j + p - n],   dw[m, n] += a[i, j] g[i + p - m, j + p - n].
// A warp goes down its eight columns row by row; the next row of x is under way meanwhile. dw stays in registers over all tiles of
// the block, whose part [K K + 2][32 V] is dw, sum(du), sum(du (x - mean)).
template <typename T, int K, int TILE>
__global__ __launch_bounds__(kCoreThreads, kCoreBlocks) void core_backward(Problem p, Backward f, Split split) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const tile = shared;
  constexpr int V = kWord<T>, kSide = TILE + K - 1, kColumns = 8, kRow = row_bytes(kSide), kAcross = TILE / kColumns;
  constexpr int kRows = TILE * kAcross / (kCoreThreads / 32);  // of a warp
  float* weights = reinterpret_cast<float*>(tile + tile_bytes(kSide));  // [K K][32 V], then scale, shift and mean: they cost
  const float* affine = weights + K * K * 32 * V;                        // a load a row there, and registers here
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), c = static_cast<int>(p.c);
  const int c0 = blockIdx.x * kChannels<T>, channel = c0 + V * lane;
  const int first_column = warp % kAcross * kColumns, first_row = warp / kAcross * kRows;
  const bool lane_on = channel < c;

  for (int i = threadIdx.x; i < K * K * 32 * V; i += kCoreThreads) {
    const int at = c0 + i % (32 * V);
    weights[i] = at < c ? widen(static_cast<const T*>(f.weight)[static_cast<int64_t>(at) * K * K + i / (32 * V)]) : 0.0f;
  }
  for (int i = threadIdx.x; i < 3 * 32 * V; i += kCoreThreads) {
    const int row = i / (32 * V), at = c0 + i % (32 * V), from = row == 0 ? bn_act::kScale : row == 1 ? bn_act::kShift : bn_act::kMean;
    weights[K * K * 32 * V + i] = f.bn && at < c ? f.bn[static_cast<int64_t>(from) * c + at] : row == 0 ? 1.0f : 0.0f;
  }
  float dw[K * K][V], s1[V] = {}, s2[V] = {};
#pragma unroll
  for (int t = 0; t < K * K; t++)
#pragma unroll
    for (int j = 0; j < V; j++) dw[t][j] = 0.0f;

  const int tiles = tiles_of_block(split);
#pragma unroll 1
  for (int index = 0; index < tiles; index++) {
    const Place at = place(split, index, p.h, p.w, TILE);
    const int64_t image = at.image * p.h * p.w * c;
    const T* dy = static_cast<const T*>(f.dy) + image;
    const auto ignore = [](const uint32_t(&)[4]) {};
    if (f.c) {
      const Gradient<T> source{{dy, static_cast<const T*>(f.y) + image}, f.c};
      fill<T, kSide, kCoreThreads, false>(tile, source, at.y - K / 2, at.x - K / 2, p.h, p.w, c, c0, ignore);
    } else {
      fill<T, kSide, kCoreThreads, false>(tile, Plain<T>{{dy}}, at.y - K / 2, at.x - K / 2, p.h, p.w, c, c0, ignore);
    }
    __syncthreads();

    const int rows = min(kRows, p.h - at.y - first_row);
    const int columns = lane_on ? p.w - at.x - first_column : 0;
    const int words = c / V;  // of a pixel
    int64_t corner = (image + (static_cast<int64_t>(at.y + first_row) * p.w + at.x + first_column) * c + channel) / V;  // in x and du
    const uint32_t* const x = static_cast<const uint32_t*>(f.x);
    uint32_t* const du = static_cast<uint32_t*>(f.du);
    const unsigned char* in = tile + first_row * kRow + first_column * kPixelBytes + lane * 4;
    uint32_t next[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; i++) next[i] = rows > 0 && i < columns ? __ldg(x + corner + i * words) : 0u;
#pragma unroll 1
    for (int row = 0; row < rows; row++) {
      float value[kColumns][V], a[kColumns][V], slope[kColumns][V], acc[kColumns][V], scale[V], shift[V], mean[V];
#pragma unroll
      for (int j = 0; j < V; j++) scale[j] = affine[lane * V + j], shift[j] = affine[(32 + lane) * V + j];
#pragma unroll
      for (int i = 0; i < kColumns; i++) {
        unpack(next[i], value[i], T());
#pragma unroll
        for (int j = 0; j < V; j++) a[i][j] = fmaf(value[i][j], scale[j], shift[j]), acc[i][j] = 0.0f;
        activate_both<T>(a[i], slope[i], p.act);
#pragma unroll
        for (int j = 0; j < V; j++) a[i][j] = i < columns ? a[i][j] : 0.0f;  // beyond the image act(0) is not 0, and g is not either
      }
      const int64_t below = corner + static_cast<int64_t>(p.w) * words;
      uint32_t here[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; i++) here[i] = next[i], next[i] = row + 1 < rows && i < columns ? __ldg(x + below + i * words) : 0u;
#pragma unroll
      for (int m = 0; m < K; m++) {
        float g[kColumns + K - 1][V];
#pragma unroll
        for (int i = 0; i < kColumns + K - 1; i++)
          unpack(*reinterpret_cast<const uint32_t*>(in + (K - 1 - m) * kRow + i * kPixelBytes), g[i], T());
#pragma unroll
        for (int n = 0; n < K; n++) {
          float w[V];
#pragma unroll
          for (int j = 0; j < V; j++) w[j] = weights[(m * K + n) * 32 * V + lane * V + j];
#pragma unroll
          for (int i = 0; i < kColumns; i++)
#pragma unroll
            for (int j = 0; j < V; j++) {
              acc[i][j] = fmaf(g[i + K - 1 - n][j], w[j], acc[i][j]);
              dw[m * K + n][j] = fmaf(g[i + K - 1 - n][j], a[i][j], dw[m * K + n][j]);
            }
        }
      }
#pragma unroll
      for (int j = 0; j < V; j++) mean[j] = affine[(64 + lane) * V + j];
#pragma unroll
      for (int i = 0; i < kColumns; i++) {
#pragma unroll
        for (int j = 0; j < V; j++) acc[i][j] *= slope[i][j];
        const uint32_t word = pack(acc[i], T());
        if (i < columns) {
          du[corner + i * words] = word;
          unpack(word, acc[i], T());
          unpack(here[i], value[i], T());
#pragma unroll
          for (int j = 0; j < V; j++) s1[j] += acc[i][j], s2[j] = fmaf(acc[i][j], value[i][j] - mean[j], s2[j]);
        }
      }
      in += kRow, corner = below;
    }
    __syncthreads();
  }

  // The warps add what they have one after the other.
  float* total = reinterpret_cast<float*>(tile);  // [K K + 2][32 V]
#pragma unroll 1
  for (int w = 0; w < kCoreThreads / 32; w++) {
    if (warp == w) {
#pragma unroll
      for (int t = 0; t < K * K + 2; t++)
#pragma unroll
        for (int j = 0; j < V; j++) {
          const float mine = t < K * K ? dw[t < K * K ? t : 0][j] : t == K * K ? s1[j] : s2[j];
          float* sum = total + t * 32 * V + lane * V + j;
          *sum = w ? *sum + mine : mine;
        }
    }
    __syncthreads();
  }
  float* part = part_of<32 * V>(f.scratch, split, K * K + 2, blockIdx.y);
  for (int i = threadIdx.x; i < (K * K + 2) * 32 * V; i += kCoreThreads) part[i] = total[i];
  join_gradients<T, 32 * V, kCoreThreads>(p, f, split, K * K, tile);
}

}  // namespace nvae::depthwise_conv::cuda
