// What the kernels of power_iteration take: one contiguous row-major matrix.
#pragma once
#include <cstdint>

namespace nvae::power_iteration {

struct Matrix {
  const float* data;
  int64_t rows, columns;
};

}  // namespace nvae::power_iteration
