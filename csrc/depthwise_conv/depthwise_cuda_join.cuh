// What the blocks of a launch have found is joined by the last of them: one launch, no atomic sums, the same bits on every run.
// Blocks of one blockIdx.x own the same channels and leave a part each; `split.group` parts are joined by the last block of that
// group, the groups by the last of those. Which block that is changes from run to run, the order of adding does not.
#pragma once
#include "depthwise_conv/depthwise_cuda_device.cuh"

namespace nvae::depthwise_conv::cuda {

// Of this column of blocks: parts [parts + groups][rows][W], W channels of a block, the ones beyond the last channel too.
template <int W>
__device__ __forceinline__ float* part_of(float* scratch, const Split& split, int rows, int index) {
  return scratch + (static_cast<int64_t>(blockIdx.x) * (split.parts + split.groups) + index) * rows * W;
}

// Whether this block is the last of `count` to come here, by every thread of it. Then it may read what the others have stored
// before, past the first-level cache (__ldcg), which knows nothing of what other multiprocessors store. The ticket is 0 again.
__device__ __forceinline__ bool arrive(unsigned* ticket, unsigned count) {
  __threadfence();
  __syncthreads();
  const bool last = __syncthreads_or(threadIdx.x == 0 && atomicInc(ticket, count - 1) == count - 1);
  if (last) __threadfence();
  return last;
}

// At the end of every block, its part stored. join(first, count, finish): adds `count` parts from `first` on, and stores the sums
// as part `index` of the groups, or, where `index` is negative, ends the work.
template <typename F>
__device__ __forceinline__ void join_parts(const Split& split, unsigned* tickets, const F& join) {
  unsigned* const mine = tickets + blockIdx.x * (1 + kMostGroups);
  const int group = blockIdx.y / split.group, first = group * split.group, count = min(split.group, split.parts - first);
  if (!arrive(mine + 1 + group, count * gridDim.z)) return;
  join(first, count, split.groups > 1 ? split.parts + group : -1);
  if (split.groups > 1 && arrive(mine, split.groups)) join(split.parts, split.groups, -1);
}

// running <- (1 - rate) running + rate found
template <typename S>
__device__ __forceinline__ void move(void* running, int64_t at, double rate, double found) {
  S* const p = static_cast<S*>(running) + at;
  if constexpr (std::is_same_v<S, double>)
    *p = (1.0 - rate) * *p + rate * found;
  else
    narrow(static_cast<float>((1.0 - rate) * widen(*p) + rate * found), *p);
}
__device__ __forceinline__ void move(void* running, int type, int64_t at, double rate, double found) {
  if (type == kFloat) move<float>(running, at, rate, found);
  if (type == kBfloat16) move<__nv_bfloat16>(running, at, rate, found);
  if (type == kHalf) move<__half>(running, at, rate, found);
  if (type == kDouble) move<double>(running, at, rate, found);
}

// What is known of channel `channel` when mean and variance are: they, or the table of the normalisation that follows, with its
// running statistics moved.
__device__ __forceinline__ void store_stats(const Forward& f, int64_t c, int64_t channel, float mean, float var) {
  float* const to = f.stats + channel;
  to[bn_act::kMean * c] = mean, to[bn_act::kVar * c] = var;
  if (!f.followed) return;
  const Following& n = f.next;
  const double rstd = 1.0 / sqrt(var + n.eps), scale = n.weight ? rstd * n.weight[channel] : rstd;
  to[bn_act::kRstd * c] = static_cast<float>(rstd), to[bn_act::kScale * c] = static_cast<float>(scale);
  to[bn_act::kShift * c] = static_cast<float>((n.bias ? n.bias[channel] : 0.0) - mean * scale);
  if (n.mean) {
    move(n.mean, n.mean_type, channel * n.mean_stride, n.rate, mean + (n.offset ? static_cast<double>(n.offset[channel]) : 0.0));
    move(n.var, n.var_type, channel * n.var_stride, n.rate, var * n.unbiased);
  }
  if (n.batches && channel == 0) ++*n.batches;
}

// The statistics of y from parts [3][W]: count, mean, squares about it (Chan et al. 1983). shared: 16 bytes a thread.
template <int W, int THREADS>
__device__ __forceinline__ void join_moments(const Problem& p, const Forward& f, const Split& split, unsigned char* shared) {
  double* const sums = reinterpret_cast<double*>(shared);
  const int lane = threadIdx.x % W, slice = threadIdx.x / W;
  const auto over_slices = [&](double mine, int row) {
    __syncthreads();
    sums[row * THREADS + threadIdx.x] = mine;
    __syncthreads();
    double sum = 0.0;
    for (int i = lane; i < THREADS; i += W) sum += sums[row * THREADS + i];
    return sum;
  };
  join_parts(split, f.tickets, [&](int first, int count, int index) {
    const float* const from = part_of<W>(f.scratch, split, 3, first) + lane;
    double values = 0.0, total = 0.0, squares = 0.0;
#pragma unroll 4
    for (int i = slice; i < count; i += THREADS / W) {
      const double n = __ldcg(from + 3 * i * W);
      values += n, total += n * __ldcg(from + (3 * i + 1) * W);
    }
    values = over_slices(values, 0);
    const double mean = over_slices(total, 1) / values;
#pragma unroll 4
    for (int i = slice; i < count; i += THREADS / W) {
      const double d = __ldcg(from + (3 * i + 1) * W) - mean;
      const double n = __ldcg(from + 3 * i * W);
      squares += __ldcg(from + (3 * i + 2) * W) + d * d * n;
    }
    squares = over_slices(squares, 0);
    if (threadIdx.x >= W) return;
    if (index >= 0) {
      float* const to = part_of<W>(f.scratch, split, 3, index) + lane;
      to[0] = static_cast<float>(values), to[W] = static_cast<float>(mean), to[2 * W] = static_cast<float>(squares);
      return;
    }
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * W + lane;
    if (channel >= p.c) return;
    const double var = squares / values;
    store_stats(f, p.c, channel, static_cast<float>(mean), static_cast<float>(var < 0.0 ? 0.0 : var));  // NaN stays
  });
}

// The table of gradients [7][c] of the normalisation before x (bn_act.h), of one channel.
__device__ __forceinline__ void store_gradients(const Backward& f, int64_t c, int64_t channel, double total, double moment) {
  const float* const bn = f.bn + channel;
  float* const to = f.table + channel;
  const double mean = bn[bn_act::kMean * c], rstd = bn[bn_act::kRstd * c], scale = bn[bn_act::kScale * c];
  double c1 = 0.0, c2 = 0.0;  // of fixed statistics, also where a sum is NaN, which then stays in its pixel
  if (f.share > 0.0) c1 = -scale * rstd * rstd * moment * f.share, c2 = -scale * total * f.share - c1 * mean;
  to[bn_act::kTotal * c] = static_cast<float>(total), to[bn_act::kMoment * c] = static_cast<float>(moment);
  to[bn_act::kDweight * c] = static_cast<float>(moment * rstd), to[bn_act::kC0 * c] = static_cast<float>(scale);
  to[bn_act::kC1 * c] = static_cast<float>(c1), to[bn_act::kC2 * c] = static_cast<float>(c2);
  to[bn_act::kDoffset * c] = static_cast<float>((f.share > 0.0 ? 0.0 : scale) * total);
}

// dweight and the table of gradients from parts [taps + 2][W]: dw, sum(du), sum(du (x - mean)). shared: 16 bytes for each of W.
template <typename T, int W, int THREADS>
__device__ __forceinline__ void join_gradients(const Problem& p, const Backward& f, const Split& split, int taps, unsigned char* shared) {
  const int rows = taps + 2, c0 = blockIdx.x * W;
  double* const sums = reinterpret_cast<double*>(shared);  // [2][W]
  join_parts(split, f.tickets, [&](int first, int count, int index) {
    const float4* const from = reinterpret_cast<const float4*>(part_of<W>(f.scratch, split, rows, first));
    float* const to = part_of<W>(f.scratch, split, rows, max(index, 0));
    for (int i = threadIdx.x; i < rows * (W / 4); i += THREADS) {
      double sum[4] = {};
#pragma unroll 8
      for (int part = 0; part < count; part++) {
        const float4 q = __ldcg(from + static_cast<int64_t>(part) * rows * (W / 4) + i);
        sum[0] += q.x, sum[1] += q.y, sum[2] += q.z, sum[3] += q.w;
      }
      const int row = i / (W / 4), lane = i % (W / 4) * 4;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (index >= 0)
          to[4 * i + j] = static_cast<float>(sum[j]);
        else if (row >= taps)
          sums[(row - taps) * W + lane + j] = sum[j];
        else if (c0 + lane + j < p.c)
          narrow(static_cast<float>(sum[j]), static_cast<T*>(f.dweight)[static_cast<int64_t>(c0 + lane + j) * taps + row]);
      }
    }
    if (index >= 0 || f.table == nullptr) return;
    __syncthreads();
    const int lane = threadIdx.x;
    if (lane < W && c0 + lane < p.c) store_gradients(f, p.c, c0 + lane, sums[lane], sums[W + lane]);
  });
}

}  // namespace nvae::depthwise_conv::cuda
