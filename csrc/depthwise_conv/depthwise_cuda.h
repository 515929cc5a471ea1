// depthwise_conv on a GPU, behind plain pointers: no torch here. Tensors are NHWC and dense in one storage type, tables are float.
// What the tensors mean: depthwise_conv.h. bn [5][c] has the rows of bn_act.h, c [3][c] is the backward of the BatchNorm behind y.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace nvae::depthwise_conv::cuda {

enum Storage { kFloat, kBfloat16, kHalf, kStorages, kDouble };  // the last of running statistics alone
enum Variant { kAuto, kAny, kCore, kTensor, kVariants };  // depthwise_cuda.cu says which one kAuto is

constexpr int kMaxKernel = 27;  // its taps fit into the 99 KB of shared memory that every GPU from 8.0 on has

struct Problem {
  int64_t n, c;
  int h, w;          // of x; with `up` 2 each of its pixels stands for 2 x 2 of the image that is convolved
  int out_h, out_w;  // (h up - 1) / stride + 1
  int kernel, stride, dilation, up, act;
  int storage, variant;
};

// The normalisation that follows (FOLLOWING in kernels/_norm.py), whose running statistics move.
struct Following {
  const float *weight, *bias, *offset;  // [c] each, or null
  void *mean, *var;                     // running statistics, or null
  int64_t mean_stride, var_stride;      // from value to value
  int mean_type, var_type;              // Storage
  int64_t* batches;                     // or null
  double eps, rate, unbiased;           // unbiased: of a variance, what the running one moves by
};

struct Forward {
  const void* x;       // [n][h][w][c]
  const float* bn;     // [5][c] or null
  const void* weight;  // [c][kernel^2]
  void* y;             // [n][out_h][out_w][c]
  float* stats;        // [2][c]: mean and biased variance of y as it is stored; or null
  bool followed;       // stats is [5][c] then, the table bn of `next`
  Following next;
  float* scratch;      // scratch_floats of the problem
  unsigned* tickets;   // tickets_of the problem
};

struct Backward {
  const void *dy, *y;  // y: null with c
  const float* c;      // [3][c] or null
  const void* x;
  const float* bn;
  const void* weight;
  void *du, *dweight;  // dweight: like weight
  float* table;        // [7][c], the table of gradients of bn_act.h; null without bn
  double share;        // of a value in the means behind bn, 1 / count; 0 where these stand fixed
  float* scratch;
  unsigned* tickets;
};

// Why these arguments cannot run, null where they can. Everything below is a function of the arguments alone: sums are always taken
// in the same order, and a launch may be recorded into a CUDA graph.
const char* refusal(const Problem&);
int chosen(const Problem&, const Forward&);
int chosen(const Problem&, const Backward&);
int64_t scratch_floats(const Problem&, const Forward&);
int64_t scratch_floats(const Problem&, const Backward&);
// How many zeros the launch wants at `tickets`, which it leaves zero: launches that may run at the same time must not share them.
constexpr int kMostGroups = 32;  // of blocks with the same channels
inline int64_t tickets_of(const Problem& p) { return (p.c + 31) / 32 * (1 + kMostGroups); }
// One kernel, on `stream` of the current device. The problem has n, c, h, w above 0.
cudaError_t launch(const Problem&, const Forward&, cudaStream_t stream);
cudaError_t launch(const Problem&, const Backward&, cudaStream_t stream);

}  // namespace nvae::depthwise_conv::cuda
