// Ops that take the statistics of what they write, told of the normalisation that follows (FOLLOWING in kernels/_norm.py).
#pragma once
#include <tuple>
#include <type_traits>

#include "bn_act/bn_act_cpu.h"

namespace nvae::bn_act {

// The table [5, C] of that normalisation from the statistics [2, C] of an image; without numbers, these.
at::Tensor followed_cpu(const at::Tensor& stats, const at::Tensor& image, at::ArrayRef<double> numbers,
                        const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                        const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& running_mean,
                        const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& batches);

// Followed<op, i>::run takes the arguments of `op`, whose i-th output is the statistics of its first one or, where they are all it
// returns, of its first argument, and then those of the normalisation.
template <auto Op, int I = 0, typename = decltype(Op)>
struct Followed;
template <auto Op, int I, typename R, typename... A>
struct Followed<Op, I, R (*)(A...)> {
  static R run(A... args, at::ArrayRef<double> numbers, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
               const std::optional<at::Tensor>& offset, const std::optional<at::Tensor>& running_mean,
               const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& batches) {
    const auto finish = [&](const at::Tensor& stats, const at::Tensor& image) {
      return followed_cpu(stats, image, numbers, weight, bias, offset, running_mean, running_var, batches);
    };
    R out = Op(args...);
    if constexpr (std::is_same_v<R, at::Tensor>)
      return finish(out, std::get<0>(std::tie(args...)));
    else
      std::get<I>(out) = finish(std::get<I>(out), std::get<0>(out));
    return out;
  }
};

}  // namespace nvae::bn_act
