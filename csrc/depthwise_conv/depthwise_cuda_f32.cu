#include "depthwise_conv/depthwise_cuda_launch.cuh"

namespace nvae::depthwise_conv::cuda {

template cudaError_t forward_of<float>(const Problem&, const Forward&, const Plan&, cudaStream_t);
template cudaError_t backward_of<float>(const Problem&, const Backward&, const Plan&, cudaStream_t);

}  // namespace nvae::depthwise_conv::cuda
