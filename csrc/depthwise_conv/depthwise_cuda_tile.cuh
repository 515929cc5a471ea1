// Tiles of an image in shared memory, [pixel][128 bytes of channels], with what a kernel does to a tensor while reading it.
#pragma once
#include "depthwise_conv/depthwise_cuda_device.cuh"

namespace nvae::depthwise_conv::cuda {

constexpr int kPixelBytes = 128;  // every bank of shared memory once
template <typename T>
constexpr int kChannels = kPixelBytes / sizeof(T);  // of a block: a word per lane
template <typename T>
constexpr int kChunk = 16 / sizeof(T);  // channels of one access

// Columns are staged four at a time.
__host__ __device__ constexpr int row_bytes(int side) { return (side + 3) / 4 * 4 * kPixelBytes; }
__host__ __device__ constexpr int tile_bytes(int side) { return side * row_bytes(side); }

// Which tile a block works on; `size` outputs each way.
struct Place {
  int64_t image;
  int y, x;
};
// Tile `index` of this block.
__device__ __forceinline__ Place place(const Split& split, int index, int out_h, int out_w, int size) {
  const unsigned across = (out_w + size - 1) / size, count = across * ((out_h + size - 1) / size);
  const unsigned all = blockIdx.y * split.per + index, image = all / count, tile = all - image * count, ty = tile / across;
  return {static_cast<int64_t>(image), static_cast<int>(ty * size), static_cast<int>((tile - ty * across) * size)};
}
__device__ __forceinline__ int tiles_of_block(const Split& split) {
  return min(split.per, static_cast<int>(split.items) - static_cast<int>(blockIdx.y) * split.per);
}

// act(scale x + shift) of one image; bn null: act(x).
template <typename T>
struct Activated {
  static constexpr int kTensors = 1, kTables = 2;
  const T* from[1];
  const float* bn;
  int act;

  __device__ __forceinline__ void tables(float (&t)[2][kChunk<T>], int64_t c, int64_t at) const {
    table_row(bn, bn_act::kScale, c, at, 1.0f, t[0]);
    table_row(bn, bn_act::kShift, c, at, 0.0f, t[1]);
#pragma unroll
    for (int i = 0; i < kChunk<T>; i++) t[0][i] *= scale_for<T>(act), t[1][i] *= scale_for<T>(act);
  }
  __device__ __forceinline__ void make(uint32_t (&v)[1][4], const float (&t)[2][kChunk<T>]) const {
    constexpr int V = kWord<T>;
    float u[kChunk<T>];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float f[V];
      unpack(v[0][i], f, T());
#pragma unroll
      for (int j = 0; j < V; j++) u[i * V + j] = fmaf(f[j], t[0][i * V + j], t[1][i * V + j]);
    }
    activate_scaled<T>(u, act);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float f[V];
#pragma unroll
      for (int j = 0; j < V; j++) f[j] = u[i * V + j];
      v[0][i] = pack(f, T());
    }
  }
};

// c0 dy + c1 y + c2 of one image.
template <typename T>
struct Gradient {
  static constexpr int kTensors = 2, kTables = 3;
  const T* from[2];  // dy, y
  const float* c;

  __device__ __forceinline__ void tables(float (&t)[3][kChunk<T>], int64_t channels, int64_t at) const {
#pragma unroll
    for (int i = 0; i < 3; i++) table_row(c, i, channels, at, 0.0f, t[i]);
  }
  __device__ __forceinline__ void make(uint32_t (&v)[2][4], const float (&t)[3][kChunk<T>]) const {
    constexpr int V = kWord<T>;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float dy[V], y[V];
      unpack(v[0][i], dy, T());
      unpack(v[1][i], y, T());
#pragma unroll
      for (int j = 0; j < V; j++) dy[j] = fmaf(dy[j], t[0][i * V + j], fmaf(y[j], t[1][i * V + j], t[2][i * V + j]));
      v[0][i] = pack(dy, T());
    }
  }
};

// dy of one image as it is.
template <typename T>
struct Plain {
  static constexpr int kTensors = 1, kTables = 0;
  const T* from[1];

  __device__ __forceinline__ void tables(float (&)[1][kChunk<T>], int64_t, int64_t) const {}
  __device__ __forceinline__ void make(uint32_t (&)[1][4], const float (&)[1][kChunk<T>]) const {}
};

// Fills `tile` [SIDE][SIDE] from row y0 and column x0 of an image [h][w][c] on, channels c0 and up; 0 outside the image, whatever
// the source makes of 0. A warp takes whole rows, a lane 16 bytes at a time, and every load of a row is under way before the first
// is used. SWIZZLE: chunk i of column x lies at i ^ (x & 7), so that 8 pixels of one chunk are in different banks. Each 16 bytes
// that were stored go to seen(words).
template <typename T, int SIDE, int THREADS, bool SWIZZLE, typename Source, typename Seen>
__device__ __forceinline__ void fill(unsigned char* tile, const Source& source, int y0, int x0, int h, int w, int c, int c0,
                                     const Seen& seen) {
  constexpr int kSteps = (SIDE + 3) / 4, kWarps = THREADS / 32, kRow = row_bytes(SIDE), M = Source::kTensors;
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), chunk = lane & 7, sub = lane >> 3;
  const bool chunk_on = c0 + chunk * kChunk<T> < c;
  const int channel = chunk_on ? c0 + chunk * kChunk<T> : c0;  // always one that exists
  float tables[Source::kTables ? Source::kTables : 1][kChunk<T>];
  source.tables(tables, c, channel);
  bool on[kSteps];
  int offset[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; s++) {
    const int x = x0 + sub + 4 * s;
    on[s] = chunk_on && static_cast<unsigned>(x) < static_cast<unsigned>(w);
    offset[s] = (on[s] ? x * c : 0) + channel;
  }
  // Column 4 s + sub: column & 7 is sub + 4 (s & 1).
  unsigned char* to[2];
#pragma unroll
  for (int odd = 0; odd < 2; odd++)
    to[odd] = tile + warp * kRow + sub * kPixelBytes + (SWIZZLE ? chunk ^ sub ^ (4 * odd) : chunk) * 16;
#pragma unroll 1
  for (int row = warp; row < SIDE; row += kWarps) {
    if (static_cast<unsigned>(y0 + row) < static_cast<unsigned>(h)) {
      const int start = (y0 + row) * w * c;
      uint4 raw[kSteps][M];
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
#pragma unroll
        for (int m = 0; m < M; m++) raw[s][m] = __ldg(reinterpret_cast<const uint4*>(source.from[m] + start + offset[s]));
        if (!on[s]) *reinterpret_cast<uint4*>(to[s & 1] + s * 4 * kPixelBytes) = make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        uint32_t v[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) v[m][0] = raw[s][m].x, v[m][1] = raw[s][m].y, v[m][2] = raw[s][m].z, v[m][3] = raw[s][m].w;
        source.make(v, tables);
        if (on[s]) {
          *reinterpret_cast<uint4*>(to[s & 1] + s * 4 * kPixelBytes) = make_uint4(v[0][0], v[0][1], v[0][2], v[0][3]);
          seen(v[0]);
        }
      }
    } else {
#pragma unroll
      for (int s = 0; s < kSteps; s++) *reinterpret_cast<uint4*>(to[s & 1] + s * 4 * kPixelBytes) = make_uint4(0, 0, 0, 0);
    }
    to[0] += kWarps * kRow, to[1] += kWarps * kRow;
  }
}

}  // namespace nvae::depthwise_conv::cuda
