// Forward 5 x 5 at stride 1 on the tensor cores, 16-bit storage (`convolve` serves the backward too). A tap is a diagonal matrix,
//   out[16 pixels, 8 channels] += a[16 pixels shifted by the tap, 8 channels] diag(k),
// and a multiplication of depth 16 does two: 8 channels under the first tap and the same 8 under the second, times the two diagonals
// one above the other. 7 of 8 products are with zeros, on a unit about 15 times as fast; what falls is the number of instructions.
//
// A block computes 16 x 16 outputs of 64 channels in 8 warps; a warp owns 8 channels, chunk `warp` of every pixel. From each of
// the 20 staged rows it loads three operands (taps 0 and 1, 2 and 3, 4 of a row of the kernel) at shifted pixels and uses them for
// up to 5 rows of outputs, 5 of which are under way. Lane 4 g + q holds of
//   a        pixels g and g + 8, channels 2 q and 2 q + 1 of each tap
//   the taps channel g at place 2 q or 2 q + 1: a value where g is one of the two, so that a register is the weight times {1, 2^16, 0}
//   out      pixels g and g + 8, channels 2 q and 2 q + 1
// Row o of outputs is finished after staged row o + 4. Nobody needs the warp's chunk of staged row o any more then, so that the
// outputs take its place, and leave in whole lines at the end.
#pragma once
#include "depthwise_conv/depthwise_cuda_join.cuh"
#include "depthwise_conv/depthwise_cuda_tile.cuh"

namespace nvae::depthwise_conv::cuda {

constexpr int kTensorThreads = 256, kTensorTile = 16, kTensorSide = 20, kTensorRow = row_bytes(kTensorSide);

// Of 16 bytes in a tile with rows of ROW bytes; as `fill` places them.
template <int ROW = kTensorRow>
__device__ __forceinline__ uint32_t chunk_offset(int row, int column, int chunk) {
  return row * ROW + column * kPixelBytes + ((chunk ^ (column & 7)) << 4);
}

template <typename T>
struct Finite;  // whether everything it has seen is finite, for half an instruction a value: 0 times it stays 0
template <>
struct Finite<__nv_bfloat16> {
  __nv_bfloat162 zero = __floats2bfloat162_rn(0.0f, 0.0f);
  __device__ __forceinline__ void see(uint32_t word) {
    zero = __hfma2(*reinterpret_cast<const __nv_bfloat162*>(&word), __floats2bfloat162_rn(0.0f, 0.0f), zero);
  }
  __device__ __forceinline__ bool all() const { return __low2float(zero) == 0.0f && __high2float(zero) == 0.0f; }
};
template <>
struct Finite<__half> {
  __half2 zero = __floats2half2_rn(0.0f, 0.0f);
  __device__ __forceinline__ void see(uint32_t word) {
    zero = __hfma2(*reinterpret_cast<const __half2*>(&word), __floats2half2_rn(0.0f, 0.0f), zero);
  }
  __device__ __forceinline__ bool all() const { return __low2float(zero) == 0.0f && __high2float(zero) == 0.0f; }
};

// Tap t of the 5 x 5 that a staged tile is convolved with. REVERSED: the filter turned by 180 degrees, as the gradient wants it.
template <bool REVERSED>
constexpr int tap(int t) {
  return REVERSED ? 24 - t : t;
}

// Whether no row of outputs needs staged row r and those below. Asked every fourth row: of images of 8 rows half is skipped, and the
// compiler does not mix more rows than there are registers for.
__device__ __forceinline__ bool ends_before(int r, int rows) { return r >= 8 && r % 4 == 0 && rows <= r - 4; }

// The lane's share of the diagonals. weight: [channels][25] from the warp's first channel on.
template <bool REVERSED>
__device__ __forceinline__ void load_diagonals(uint32_t (&taps)[25], const void* weight) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  const unsigned short* k = static_cast<const unsigned short*>(weight) + g * 25;
  const uint32_t place = g == 2 * q ? 1u : g == 2 * q + 1 ? 0x10000u : 0u;
#pragma unroll
  for (int t = 0; t < 25; t++) taps[t] = __ldg(k + tap<REVERSED>(t)) * place;
}

// The warp's 8 channels of 16 x 16 outputs from the staged tile, row after row to finish(row, out).
template <typename T, typename Finish>
__device__ __forceinline__ void convolve(const unsigned char* tile, const uint32_t (&taps)[25], int warp, int rows,
                                         const Finish& finish) {
  // Where this lane's share of an operand comes from: pixel lane % 16, shifted by the first or the second tap of a pair.
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  const int lane = threadIdx.x & 31, pixel = lane & 15, second = lane >> 4;
  const uint32_t from01 = base + chunk_offset(0, pixel + second, warp), from23 = base + chunk_offset(0, pixel + 2 + second, warp);
  const uint32_t from4 = base + chunk_offset(0, pixel + 4, warp);
  float acc[5][4];
#pragma unroll
  for (int r = 0; r < kTensorSide; r++) {
    if (ends_before(r, rows)) break;
    uint32_t a01[4], a23[4], a4[2];
    load_matrices(a01, from01 + r * kTensorRow);
    load_matrices(a23, from23 + r * kTensorRow);
    load_matrices(a4, from4 + r * kTensorRow);
    // Inside, the loops over rows of outputs: independent multiplications one after the other.
#pragma unroll
    for (int m = 0; m < 5; m++)
      if (r - m >= 0 && r - m < kTensorTile) {
        float(&d)[4] = acc[(r - m) % 5];
        if (m == 0) d[0] = d[1] = d[2] = d[3] = 0.0f;
        multiply_add<T>(d, a01, taps[m * 5], taps[m * 5 + 1]);
      }
#pragma unroll
    for (int m = 0; m < 5; m++)
      if (r - m >= 0 && r - m < kTensorTile) multiply_add<T>(acc[(r - m) % 5], a23, taps[m * 5 + 2], taps[m * 5 + 3]);
#pragma unroll
    for (int m = 0; m < 5; m++)
      if (r - m >= 0 && r - m < kTensorTile) multiply_add<T>(acc[(r - m) % 5], a4, taps[m * 5 + 4]);
    if (r >= 4) finish(r - 4, acc[(r - 4) % 5]);
  }
}

// The same of a tile with a value that is not finite: 0 times NaN or infinity is NaN, and would spread over the 8 channels.
template <typename T, bool REVERSED, typename Finish>
__device__ __forceinline__ void convolve_by_taps(const unsigned char* tile, const void* weight, int warp, int rows,
                                                 const Finish& finish) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  const T* k = static_cast<const T*>(weight) + 2 * q * 25;
#pragma unroll 1
  for (int o = 0; o < rows; o++) {
    float d[4] = {};
#pragma unroll 1
    for (int t = 0; t < 25; t++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float v[2];
        load(reinterpret_cast<const T*>(tile + chunk_offset(o + t / 5, g + 8 * half + t % 5, warp) + q * 4), v);
#pragma unroll
        for (int j = 0; j < 2; j++) d[2 * half + j] = fmaf(v[j], widen(k[j * 25 + tap<REVERSED>(t)]), d[2 * half + j]);
      }
    __syncwarp();
    finish(o, d);
  }
}

// Outputs that the warps have left in a tile with rows of ROW bytes, to `out` [h][w][c] at the tile's place, in whole lines.
template <typename T, int ROW>
__device__ __forceinline__ void store_tile(const unsigned char* tile, T* out, const Place& at, int rows, int columns, int w, int c,
                                           int c0) {
  const int chunk = threadIdx.x & 7, column = (threadIdx.x >> 3) & 15, row0 = threadIdx.x >> 7;
  if (column >= columns || c0 + chunk * 8 >= c) return;
  out += (static_cast<int64_t>(at.y + row0) * w + at.x + column) * c + c0 + chunk * 8;
  const unsigned char* in = tile + chunk_offset<ROW>(row0, column, chunk);
#pragma unroll
  for (int i = 0; i < kTensorTile / 2; i++) {
    if (row0 + 2 * i < rows) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(in + 2 * i * ROW);
    out += static_cast<int64_t>(2) * w * c;
  }
}

template <typename T>
__global__ __launch_bounds__(kTensorThreads, 2) void tensor_forward(Problem p, Forward f, Split split) {
  extern __shared__ __align__(128) unsigned char shared[];
  unsigned char* const tile = shared;
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), c = static_cast<int>(p.c);
  const int c0 = blockIdx.x * kChannels<T>, g = lane >> 2, q = lane & 3, channel = c0 + warp * 8;
  const bool warp_on = channel < c;

  const T* const weight = static_cast<const T*>(f.weight) + static_cast<int64_t>(warp_on ? channel : c0) * 25;
  unsigned char* to[2] = {tile + chunk_offset(0, g, warp) + q * 4, tile + chunk_offset(0, g + 8, warp) + q * 4};

  Moments<2> moments;
  const int tiles = tiles_of_block(split);
#pragma unroll 1
  for (int index = 0; index < tiles; index++) {
    const Place at = place(split, index, p.h, p.w, kTensorTile);
    const int64_t image = at.image * p.h * p.w * c;
    const int rows = min(kTensorTile, p.h - at.y), columns = min(kTensorTile, p.w - at.x);
    Finite<T> finite;
    const Activated<T> source{{static_cast<const T*>(f.x) + image}, f.bn, p.act};
    fill<T, kTensorSide, kTensorThreads, true>(tile, source, at.y - 2, at.x - 2, p.h, p.w, c, c0, [&](const uint32_t(&v)[4]) {
#pragma unroll
      for (int i = 0; i < 4; i++) finite.see(v[i]);
    });
    uint32_t taps[25];
    load_diagonals<false>(taps, weight);
    const int mine = (g < columns) + (g + 8 < columns);  // of this lane's two pixels
    // One row of outputs to the tile and the moments.
    const auto finish = [&](int o, const float(&d)[4]) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float v[2] = {d[2 * half], d[2 * half + 1]};
        const uint32_t word = pack(v, T());
        *reinterpret_cast<uint32_t*>(to[half] + o * kTensorRow) = word;
        unpack(word, v, T());
        moments.add(v, o < rows && g + 8 * half < columns);
      }
      if (index == 0 && (o == 0 || o == 3)) {
        moments.count = static_cast<float>(min(o + 1, rows) * mine);
        moments.centre();
      }
    };
    const bool ordinary = !__syncthreads_or(!finite.all());
    if (warp_on && ordinary)
      convolve<T>(tile, taps, warp, rows, finish);
    else if (warp_on)
      convolve_by_taps<T, false>(tile, weight, warp, rows, finish);
    moments.count += static_cast<float>((index == 0 ? max(rows - 4, 0) : rows) * mine);
    moments.centre();
    __syncthreads();
    store_tile<T, kTensorRow>(tile, static_cast<T*>(f.y) + image, at, rows, columns, p.w, c, c0);
    __syncthreads();
  }
  if (f.stats == nullptr) return;
  // The warp owns its channels: joined over its pixels, which are 4 lanes apart.
#pragma unroll 1
  for (int step = 4; step < 32; step *= 2) {
    const float count = __shfl_xor_sync(~0u, moments.count, step);
    float mean[2], squares[2];
#pragma unroll
    for (int j = 0; j < 2; j++)
      mean[j] = __shfl_xor_sync(~0u, moments.pivot[j], step), squares[j] = __shfl_xor_sync(~0u, moments.s2[j], step);
    moments.join(count, mean, squares);
  }
  if (g == 0) moments.write(part_of<kChannels<T>>(f.scratch, split, 3, blockIdx.y), kChannels<T>, warp * 8 + 2 * q);
  join_moments<kChannels<T>, kTensorThreads>(p, f, split, tile);
}

}  // namespace nvae::depthwise_conv::cuda
