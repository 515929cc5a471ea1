// The extension module nvae_fast._C: facts about this build. Importing it also registers the native implementations for
// the schemas that Python declares (kernels/<op>/ops.py), one line each.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "adamax/adamax_cpu.h"
#include "bn_act/bn_act_cpu.h"
#include "bn_act/followed.h"
#include "common/isa.h"
#include "common/pool.h"
#include "depthwise_conv/depthwise_conv_cpu.h"
#include "depthwise_conv/depthwise_conv_cuda.h"
#include "flow_cell/flow_cell_cpu.h"
#include "logistic_mixture/logistic_mixture_cpu.h"
#include "pointwise_conv/pointwise_conv_cpu.h"
#include "power_iteration/power_iteration_cpu.h"
#include "residual_normal/residual_normal_cpu.h"
#include "se_residual/se_residual_cpu.h"
#include "weight_norm/weight_norm_cpu.h"

namespace {
using nvae::bn_act::Followed;
using Stats = Followed<nvae::bn_act::stats_cpu>;
using Depthwise = Followed<nvae::depthwise_conv::forward_cpu, 1>;
using Pointwise = Followed<nvae::pointwise_conv::forward_cpu, 1>;
using Residual = Followed<nvae::se_residual::forward_cpu, 2>;

void register_cpu(torch::Library& m) {
  m.impl("bn_act_stats", TORCH_FN(Stats::run));
  m.impl("bn_act_coefficients", TORCH_FN(nvae::bn_act::coefficients_cpu));
  m.impl("bn_act_gradients", TORCH_FN(nvae::bn_act::gradients_cpu));
  m.impl("bn_act_fwd", TORCH_FN(nvae::bn_act::forward_cpu));
  m.impl("bn_act_sums", TORCH_FN(nvae::bn_act::sums_cpu));
  m.impl("bn_act_bwd", TORCH_FN(nvae::bn_act::backward_cpu));
  m.impl("bn_act_affine_", TORCH_FN(nvae::bn_act::affine_cpu_));
  m.impl("depthwise_conv_fwd", TORCH_FN(Depthwise::run));
  m.impl("depthwise_conv_bwd", TORCH_FN(nvae::depthwise_conv::backward_cpu));
  m.impl("depthwise_conv_bwd_", TORCH_FN(nvae::depthwise_conv::backward_cpu_));
  m.impl("flow_cell_fwd", TORCH_FN(nvae::flow_cell::forward_cpu));
  m.impl("flow_cell_bwd", TORCH_FN(nvae::flow_cell::backward_cpu));
  m.impl("logistic_mixture_log_prob_fwd", TORCH_FN(nvae::logistic_mixture::forward_cpu));
  m.impl("logistic_mixture_log_prob_bwd", TORCH_FN(nvae::logistic_mixture::backward_cpu));
  m.impl("pointwise_conv_fwd", TORCH_FN(Pointwise::run));
  m.impl("pointwise_conv_bwd", TORCH_FN(nvae::pointwise_conv::backward_cpu));
  m.impl("power_iteration_fwd", TORCH_FN(nvae::power_iteration::forward_cpu));
  m.impl("power_iteration_add", TORCH_FN(nvae::power_iteration::add_cpu));
  m.impl("power_iteration_bwd", TORCH_FN(nvae::power_iteration::backward_cpu));
  m.impl("residual_normal_fwd", TORCH_FN(nvae::residual_normal::forward_cpu));
  m.impl("residual_normal_bwd", TORCH_FN(nvae::residual_normal::backward_cpu));
  m.impl("normal_log_prob_fwd", TORCH_FN(nvae::residual_normal::log_prob_forward_cpu));
  m.impl("normal_log_prob_bwd", TORCH_FN(nvae::residual_normal::log_prob_backward_cpu));
  m.impl("se_residual_fwd", TORCH_FN(Residual::run));
  m.impl("se_residual_bwd", TORCH_FN(nvae::se_residual::backward_cpu));
  m.impl("weight_norm_fwd", TORCH_FN(nvae::weight_norm::forward_cpu));
  m.impl("weight_norm_bwd", TORCH_FN(nvae::weight_norm::backward_cpu));
}

// They look at the tensors of a list one by one, or at none.
void register_lists(torch::Library& m) {
  m.impl("adamax_place", TORCH_FN(nvae::adamax::place));
  m.impl("adamax_squares", TORCH_FN(nvae::adamax::squares));
  m.impl("adamax_step_", TORCH_FN(nvae::adamax::step_));
}

// By the import, not by the loader before it (TORCH_LIBRARY_IMPL): an implementation of a schema that Python declares otherwise by
// now, in a build older than the Python beside it, is then an ImportError instead of the end of the process.
void register_all() {
  static std::vector<torch::Library> kept;
  const auto add = [](c10::DispatchKey key, void (*register_some)(torch::Library&)) {
    torch::Library library(torch::Library::IMPL, "nvae_fast", key, __FILE__, __LINE__);
    register_some(library);
    kept.push_back(std::move(library));
  };
  add(c10::DispatchKey::CPU, register_cpu);
  add(c10::DispatchKey::CompositeExplicitAutograd, register_lists);
#ifdef NVAE_FAST_CUDA
  add(c10::DispatchKey::CUDA, nvae::depthwise_conv::register_cuda);
#endif
}
}  // namespace

#if defined(__clang__)
#define NVAE_FAST_COMPILER "clang"
#else
#define NVAE_FAST_COMPILER "gcc"
#endif

PYBIND11_MODULE(_C, m) {
  register_all();
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
  m.def("release_memory", &nvae::release_pool,
        "Give the memory that the CPU ops keep for their next outputs back to the system; how many bytes that were.");
  m.def("instruction_set", [] { return nvae::kIsaNames[nvae::current_isa()]; },
        "The instruction set that the CPU kernels use.");
  m.def("use_instruction_set", &nvae::use_isa,
        "Make the CPU kernels use this one; False when the CPU or this build lacks it.");
}
