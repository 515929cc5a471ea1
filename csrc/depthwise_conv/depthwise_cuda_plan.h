// Which kernel runs, and how its work is cut: functions of the sizes and of the pointers' alignment alone.
#pragma once
#include <algorithm>

#include "depthwise_conv/depthwise_cuda.h"

namespace nvae::depthwise_conv::cuda {

// Work items of a block: [part per, part per + per). What the blocks find is joined in `groups` of `group` parts first.
struct Split {
  int64_t items;
  int per, parts, group, groups;
};

struct Plan {
  int variant, tile;  // outputs of a tile each way
  int word;           // channels of a lane, of kAny
  Split split;
};
Plan plan(const Problem&, const Forward&);
Plan plan(const Problem&, const Backward&);

inline unsigned blocks_of(const Problem& p, int channels) { return static_cast<unsigned>((p.c + channels - 1) / channels); }

// In depthwise_cuda_<type>.cu, one for each storage type.
template <typename T>
cudaError_t forward_of(const Problem&, const Forward&, const Plan&, cudaStream_t);
template <typename T>
cudaError_t backward_of(const Problem&, const Backward&, const Plan&, cudaStream_t);

}  // namespace nvae::depthwise_conv::cuda
