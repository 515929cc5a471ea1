// Which kernel runs, and how its work is cut over blocks.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "depthwise_conv/depthwise_cuda_plan.h"

namespace nvae::depthwise_conv::cuda {
namespace {

// kAuto takes the first row whose conditions hold. The reasons are counted, not measured: kernels/depthwise_conv/README.md.
struct Row {
  int variant, tile;
  bool forward, backward;
  int kernels[2];
  int storage_bytes;  // at most
  int least_side;     // of the image: the longer side must be above it
};
constexpr Row kTable[] = {
    {kTensor, 16, true, true, {5, 5}, 2, 8},  // half the instructions of kCore; below 9 x 9 half of its pixels would be empty
    {kCore, 16, true, true, {3, 5}, 4, 8},     // each value read once and activated once, taps from registers
    {kCore, 8, true, true, {3, 5}, 4, 0},      // the same for images that fill a quarter of the large tile
    {kAny, 0, true, true, {1, kMaxKernel}, 4, 0},
};

#ifndef NVAE_DEPTHWISE_BLOCKS  // the tests want few, so that a block has many tiles
#define NVAE_DEPTHWISE_BLOCKS (132 * 9)
#endif
constexpr int kBlocks = NVAE_DEPTHWISE_BLOCKS;        // wanted: three times what an H200 holds of kCore at once
constexpr int kMostTiles = 16;                        // of a block: no sum in float gets longer than 1024 values
constexpr int kLeastPixels = 32, kMostPixels = 4096;  // of a block of kAny, which has 8 warps
constexpr int64_t kMostRows = 65535;                  // of a grid
constexpr int64_t kScratch = 1 << 25;                 // floats of partial sums, about
#ifndef NVAE_DEPTHWISE_GROUP
#define NVAE_DEPTHWISE_GROUP 8
#endif
constexpr int kLeastGroup = NVAE_DEPTHWISE_GROUP;  // parts that one block reads at once

int bytes_of(const Problem& p) { return p.storage == kFloat ? 4 : 2; }

bool holds(const Row& row, const Problem& p, bool forward, bool aligned) {
  if (!(forward ? row.forward : row.backward) || bytes_of(p) > row.storage_bytes || std::max(p.h, p.w) <= row.least_side) return false;
  if (row.variant == kAny) return true;
  const bool dense = p.stride == 1 && p.dilation == 1 && p.up == 1 && (p.kernel == row.kernels[0] || p.kernel == row.kernels[1]);
  const int64_t image = (static_cast<int64_t>(p.h) + 32) * (static_cast<int64_t>(p.w) + 32) * p.c;  // 32-bit offsets
  const int64_t side = row.tile, tiles = p.n * ((p.h + side - 1) / side) * ((p.w + side - 1) / side);
  constexpr int64_t kMost = int64_t{1} << 31;
  return dense && aligned && p.c * bytes_of(p) % 16 == 0 && image < kMost && tiles < kMost;
}

Split cut(int64_t items, int64_t blocks_across, int64_t least, int64_t most, int64_t rows_of_scratch) {
  const int64_t room = std::max<int64_t>(kScratch / std::max<int64_t>(rows_of_scratch, 1), 1);
  const int64_t wanted = std::max<int64_t>(kBlocks / blocks_across, 1);
  int64_t per = std::min((items + wanted - 1) / wanted, most);
  per = std::max({per, least, (items + kMostRows - 1) / kMostRows, (items + room - 1) / room});
  const int64_t parts = (items + per - 1) / per, group = std::max<int64_t>((parts + kMostGroups - 1) / kMostGroups, kLeastGroup);
  return {items, static_cast<int>(per), static_cast<int>(parts), static_cast<int>(group), static_cast<int>((parts + group - 1) / group)};
}

bool aligned(uintptr_t bits, uintptr_t bytes) { return bits % bytes == 0; }
uintptr_t bits(const void* p) { return reinterpret_cast<uintptr_t>(p); }

Plan plan(const Problem& p, bool forward, uintptr_t pointers, uintptr_t tables, int64_t rows) {
  for (const Row& row : kTable) {
    if ((p.variant != kAuto && p.variant != row.variant) || !holds(row, p, forward, aligned(pointers | tables, 16))) continue;
    Plan plan{row.variant, row.tile, 1, {}};
    if (row.variant == kAny) {
      const int word = 4 / bytes_of(p);
      if (p.c % word == 0 && aligned(pointers, 4)) plan.word = word;
      const int64_t pixels = p.n * (forward ? static_cast<int64_t>(p.out_h) * p.out_w : static_cast<int64_t>(p.h) * p.w);
      plan.split = cut(pixels, blocks_of(p, 32 * plan.word), kLeastPixels, kMostPixels, rows * p.c);
    } else {
      const int64_t down = (p.h + row.tile - 1) / row.tile, across = (p.w + row.tile - 1) / row.tile;
      plan.split = cut(p.n * down * across, blocks_of(p, 128 / bytes_of(p)), 1, kMostTiles, rows * p.c);
    }
    return plan;
  }
  return {kAuto, 0, 0, {}};
}
}  // namespace

Plan plan(const Problem& p, const Forward& f) { return plan(p, true, bits(f.x) | bits(f.y), bits(f.bn), 3); }
Plan plan(const Problem& p, const Backward& f) {
  const uintptr_t pointers = bits(f.dy) | bits(f.y) | bits(f.x) | bits(f.du);
  return plan(p, false, pointers, bits(f.bn) | bits(f.c), p.kernel * p.kernel + 2);
}

const char* refusal(const Problem& p) {
  if (p.kernel < 1 || p.kernel % 2 == 0 || p.kernel > kMaxKernel) return "expected an odd kernel of at most 27";
  if ((p.stride != 1 && p.stride != 2) || p.dilation < 1 || (p.up != 1 && !(p.up == 2 && p.stride == 1)))
    return "expected stride 1 or 2, a positive dilation, and stride 1 to upsample by 2";
  if (p.storage < 0 || p.storage >= kStorages) return "expected storage in float32, bfloat16 or float16";
  if (p.variant < kAuto || p.variant >= kVariants) return "expected a variant of 0 (auto), 1 (any), 2 (core) or 3 (tensor)";
  if (p.c >= (int64_t{1} << 30)) return "expected fewer than 2^30 channels";
  if (p.n * std::max(p.h, p.out_h) * std::max(p.w, p.out_w) >= (int64_t{1} << 31)) return "expected fewer than 2^31 pixels";
  return nullptr;
}

int chosen(const Problem& p, const Forward& f) { return plan(p, f).variant; }
int chosen(const Problem& p, const Backward& f) { return plan(p, f).variant; }

int64_t scratch_floats(const Problem& p, const Plan& found, int rows) {
  const int channels = found.variant == kAny ? 32 * found.word : 128 / bytes_of(p);
  return static_cast<int64_t>(found.split.parts + found.split.groups) * rows * blocks_of(p, channels) * channels;
}
int64_t scratch_floats(const Problem& p, const Forward& f) { return f.stats ? scratch_floats(p, plan(p, f), 3) : 0; }
int64_t scratch_floats(const Problem& p, const Backward& f) { return scratch_floats(p, plan(p, f), p.kernel * p.kernel + 2); }

cudaError_t launch(const Problem& p, const Forward& f, cudaStream_t stream) {
  const Plan found = plan(p, f);
  if (refusal(p) || found.variant == kAuto) return cudaErrorInvalidValue;
  const auto run = p.storage == kFloat ? forward_of<float> : p.storage == kHalf ? forward_of<__half> : forward_of<__nv_bfloat16>;
  return run(p, f, found, stream);
}

cudaError_t launch(const Problem& p, const Backward& f, cudaStream_t stream) {
  const Plan found = plan(p, f);
  if (refusal(p) || found.variant == kAuto) return cudaErrorInvalidValue;
  const auto run = p.storage == kFloat ? backward_of<float> : p.storage == kHalf ? backward_of<__half> : backward_of<__nv_bfloat16>;
  return run(p, f, found, stream);
}

}  // namespace nvae::depthwise_conv::cuda
