// What the kernels of logistic_mixture take: up to kBlock pixels of one image, as one row of floats per channel.
#pragma once
#include <cstdint>

namespace nvae::logistic_mixture {

constexpr int kBlock = 128;

struct Settings {
  int channels, mixtures;
  float half_bin;  // 1 / K
  float log_bin;   // log(2 / K)
  float top;       // y above it counts as the top level
};

// Rows of n pixels, `stride` floats apart.
struct Rows {
  float* data;
  int64_t stride;
};

struct Inputs {
  Settings settings;
  Rows x, params;  // [C], [M (1 + 2C + C(C-1)/2)]
  int n;
  float* scratch;  // scratch_rows() rows of kBlock floats
};

inline int64_t scratch_rows(const Settings& s) { return 5 + s.channels + s.mixtures; }

// Some pixels of a tensor: channel c of pixel i is data[c * stride_c + offset[i]].
template <typename T>
struct Pixels {
  T* data;
  int64_t stride_c;
  int channels, n;
  const int64_t* offset;
  bool neighbours;  // offset[i] is offset[0] + i
};

}  // namespace nvae::logistic_mixture
