// Arguments of the flow_cell kernels. Images are NHWC, dense and float; the hidden channels are cut into blocks of one vector.
#pragma once
#include <cstdint>

namespace nvae::flow_cell {

struct Shape {
  int64_t n;
  int h, w, z, e;  // z: channels, e: hidden channels
};

// Weights as the kernels read them, zero where a block has no channel. L lanes, zv = z rounded up to whole vectors.
struct Weights {
  const float* in;       // [block][3][3][z][L]
  const float* in_back;  // [block][3][3][L][zv], columns of the kernel reversed
  const float* dw;       // [block][25][L]
  const float* out;      // [block][z][L]
  const float* out_fwd;  // [block][L][zv]
  const float* bias;     // [z]
  // What is computed with: columns first[r] <= c < last[r] of row r of the 3x3 kernels, the live taps of the 5x5 ones.
  int first[3], last[3];
  bool live[25];
};

// Sums over the images of a task: per block [9 z + 25 + z][L] (w_in as [3][3][z], w_dw, -w_out), then -bias_out [z].
inline int64_t gradient_rows(const Shape& s) { return 10 * static_cast<int64_t>(s.z) + 25; }

// Images of a task: enough tasks for most machines, and not more sums of gradients than those.
inline int64_t images_of_task(const Shape& s) { return (s.n + 15) / 16; }

// One task. scratch_floats of memory on a 64-byte boundary, any contents.
struct Kernels {
  int lanes;
  int64_t (*scratch_floats)(const Shape&);
  void (*forward)(const Shape&, const Weights&, int64_t images, const float* z, float* y, float* scratch);
  void (*backward)(const Shape&, const Weights&, int64_t images, const float* dy, const float* z, float* dz, float* gradients,
                   float* scratch);
};

}  // namespace nvae::flow_cell
