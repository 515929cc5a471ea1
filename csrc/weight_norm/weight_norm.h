// What the backward of weight_norm sums over a row: x = w mask, g = the gradient of the effective weight.
#pragma once

namespace nvae::weight_norm {

struct Sums {
  double squares, product;  // of x², of g x
};

}  // namespace nvae::weight_norm
