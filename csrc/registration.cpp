// The extension module nvae_fast._C: facts about this build. Importing it also registers the native implementations for
// the schemas that Python declares (kernels/<op>/ops.py), one line each.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "common/isa.h"
#include "depthwise_conv/depthwise_conv_cpu.h"
#include "power_iteration/power_iteration_cpu.h"
#include "residual_normal/residual_normal_cpu.h"
#include "weight_norm/weight_norm_cpu.h"

TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  m.impl("depthwise_conv_fwd", TORCH_FN(nvae::depthwise_conv::forward_cpu));
  m.impl("depthwise_conv_bwd", TORCH_FN(nvae::depthwise_conv::backward_cpu));
  m.impl("power_iteration_fwd", TORCH_FN(nvae::power_iteration::forward_cpu));
  m.impl("power_iteration_bwd", TORCH_FN(nvae::power_iteration::backward_cpu));
  m.impl("residual_normal_fwd", TORCH_FN(nvae::residual_normal::forward_cpu));
  m.impl("residual_normal_bwd", TORCH_FN(nvae::residual_normal::backward_cpu));
  m.impl("weight_norm_fwd", TORCH_FN(nvae::weight_norm::forward_cpu));
  m.impl("weight_norm_bwd", TORCH_FN(nvae::weight_norm::backward_cpu));
}

#if defined(__clang__)
#define NVAE_FAST_COMPILER "clang"
#else
#define NVAE_FAST_COMPILER "gcc"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of nvae_fast.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = NVAE_FAST_TORCH;
    info["compiler"] = NVAE_FAST_COMPILER " " __VERSION__;
#ifdef NVAE_FAST_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    pybind11::list names;
#ifdef NVAE_EACH_ISA
    for (const char* name : nvae::kIsaNames) names.append(name);
#else
    names.append(nvae::kIsaNames[nvae::kBaseline]);
#endif
    info["instruction_sets"] = names;
    return info;
  });
  m.def("instruction_set", [] { return nvae::kIsaNames[nvae::current_isa()]; },
        "The instruction set that the CPU kernels use.");
  m.def("use_instruction_set", &nvae::use_isa,
        "Make the CPU kernels use this one; False when the CPU or this build lacks it.");
}
