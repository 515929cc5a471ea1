// The launchers as C functions, for ctypes.
#include "cuda_runtime.h"
#include "depthwise_conv/depthwise_cuda.h"

using namespace nvae::depthwise_conv::cuda;

#ifdef WITHOUT_BFLOAT16
#include "cuda_bf16.h"
#include "depthwise_conv/depthwise_cuda_plan.h"
namespace nvae::depthwise_conv::cuda {
template <>
cudaError_t forward_of<__nv_bfloat16>(const Problem&, const Forward&, const Plan&, cudaStream_t) { return cudaErrorLaunchFailure; }
template <>
cudaError_t backward_of<__nv_bfloat16>(const Problem&, const Backward&, const Plan&, cudaStream_t) { return cudaErrorLaunchFailure; }
}  // namespace nvae::depthwise_conv::cuda
#endif

extern "C" {
void set_reversed(int on) { emulator::reversed = on != 0; }
const char* why_not(const Problem* p) { return refusal(*p); }
int forward_variant(const Problem* p, const Forward* f) { return chosen(*p, *f); }
int backward_variant(const Problem* p, const Backward* f) { return chosen(*p, *f); }
int64_t forward_scratch(const Problem* p, const Forward* f) { return scratch_floats(*p, *f); }
int64_t backward_scratch(const Problem* p, const Backward* f) { return scratch_floats(*p, *f); }
int64_t tickets(const Problem* p) { return tickets_of(*p); }
int launches() { return emulator::launches; }
int forward(const Problem* p, const Forward* f) { return launch(*p, *f, nullptr); }
int backward(const Problem* p, const Backward* f) { return launch(*p, *f, nullptr); }
}
