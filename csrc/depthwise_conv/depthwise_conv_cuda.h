// What registration.cpp calls of a build with CUDA.
#pragma once
#include <torch/library.h>

namespace nvae::depthwise_conv {
void register_cuda(torch::Library&);
}
