// adamax on the CPU: every float32 parameter of a list in one pass. The elements of all parameters stand in one long row,
// cut into chunks of equal length, which threads take in turn; no sum crosses elements, so that results depend neither on
// the number of threads nor on who takes what.
#include "adamax/adamax_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "adamax/adamax.h"
#include "common/isa.h"

namespace nvae::adamax {
namespace {

#define NVAE_KERNEL "adamax/adamax_kernel.h"
#include "common/each_isa.h"

using at::Tensor;

constexpr int64_t kChunk = 1 << 14;  // elements, in one thread's hands at a time
constexpr int64_t kShare = 1 << 16;  // elements a thread should find: fewer cost less than waking it

// A parameter whose four arrays list their elements in the same order; its first one is number `begin` of the row.
struct Part {
  Elements elements;
  float size;
  int64_t begin;
};

bool plain(const Tensor& t) {
  return t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat;
}

// Equal strides where they matter: those of axes of length 1 do not.
bool same_order(const Tensor& t, const Tensor& like) {
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) != 1 && t.stride(d) != like.stride(d)) return false;
  return true;
}

void wrote(const Tensor& t) {  // what torch's in-place operations tell autograd
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

// t itself or, where its memory has another order, a copy in the order of `like`. `back` collects what to copy back.
Tensor ordered(const Tensor& t, const Tensor& like, std::vector<std::pair<Tensor, Tensor>>* back) {
  if (t.is_same(like) || same_order(t, like)) return t;
  Tensor copy = at::empty_strided(like.sizes(), like.strides(), like.options()).copy_(t);
  if (back) back->emplace_back(t, copy);
  return copy;
}

void check(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_infs,
           at::TensorList steps) {
  const size_t n = params.size();
  TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_infs.size() == n && steps.size() == n, "adamax: ", n,
              " params, ", grads.size(), " grads, ", exp_avgs.size(), " exp_avgs, ", exp_infs.size(), " exp_infs, ",
              steps.size(), " steps; expected as many of each");
  for (size_t i = 0; i < n; i++) {
    TORCH_CHECK(!grads[i].is_sparse(), "Adamax does not support sparse gradients");
    const auto sizes = params[i].sizes();
    TORCH_CHECK(grads[i].sizes() == sizes && exp_avgs[i].sizes() == sizes && exp_infs[i].sizes() == sizes &&
                    steps[i].numel() == 1,
                "adamax: params[", i, "] has shape ", sizes, ", its grad ", grads[i].sizes(), ", exp_avg ",
                exp_avgs[i].sizes(), ", exp_inf ", exp_infs[i].sizes(), ", step ", steps[i].sizes(),
                "; expected one shape, and one number as step");
  }
}

}  // namespace

std::vector<int64_t> adamax_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_infs,
                             at::TensorList steps, double lr, double beta1, double beta2, double eps, double weight_decay,
                             bool maximize) {
  check(params, grads, exp_avgs, exp_infs, steps);
  std::vector<int64_t> left;
  std::vector<Part> parts;
  std::vector<Tensor> copies;  // alive until the end
  std::vector<std::pair<Tensor, Tensor>> back;
  parts.reserve(params.size());
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); i++) {
    const Tensor &p = params[i], &g = grads[i], &m = exp_avgs[i], &u = exp_infs[i], &s = steps[i];
    if (!(plain(p) && plain(g) && plain(m) && plain(u) && plain(s))) {
      left.push_back(static_cast<int64_t>(i));
      continue;
    }
    const double t = *s.mutable_data_ptr<float>() += 1.0f;
    const float size = static_cast<float>(-(lr / (1.0 - std::pow(beta1, t))));
    for (const Tensor* each : {&p, &m, &u, &s}) wrote(*each);
    if (p.numel() == 0) continue;
    Elements e{};
    e.n = p.numel();
    if (p.is_non_overlapping_and_dense() && same_order(g, p) && same_order(m, p) && same_order(u, p)) {
      e.param = p.mutable_data_ptr<float>(), e.grad = g.const_data_ptr<float>();
      e.exp_avg = m.mutable_data_ptr<float>(), e.exp_inf = u.mutable_data_ptr<float>();
    } else {
      Tensor dense = p;
      if (!p.is_non_overlapping_and_dense()) back.emplace_back(p, dense = p.contiguous());
      const Tensor grad = ordered(g, dense, nullptr), avg = ordered(m, dense, &back), inf = ordered(u, dense, &back);
      e.param = dense.mutable_data_ptr<float>(), e.grad = grad.const_data_ptr<float>();
      e.exp_avg = avg.mutable_data_ptr<float>(), e.exp_inf = inf.mutable_data_ptr<float>();
      copies.push_back(grad);
    }
    parts.push_back({e, size, total});
    total += e.n;
  }

  Step step{};
  step.weight = static_cast<float>(1.0 - beta1);
  step.beta2 = static_cast<float>(beta2), step.eps = static_cast<float>(eps);
  step.decay = static_cast<float>(weight_decay), step.sign = maximize ? -1.0f : 1.0f;
  const auto run = NVAE_SELECT(update);
  std::atomic<int64_t> next{0};  // chunks go to whoever is free: other programs may hold up a thread
  const int64_t tasks = std::min<int64_t>(at::get_num_threads(), (total + kShare - 1) / kShare);
  at::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    const auto after = [](int64_t at, const Part& part) { return at < part.begin; };
    for (int64_t at; (at = next.fetch_add(kChunk)) < total;) {
      const int64_t end = std::min(total, at + kChunk);
      for (auto part = std::upper_bound(parts.begin(), parts.end(), at, after) - 1; at < end; ++part) {
        const Elements& whole = part->elements;
        const int64_t skip = at - part->begin, n = std::min(end - at, whole.n - skip);
        Step own = step;
        own.size = part->size;
        run({whole.param + skip, whole.grad + skip, whole.exp_avg + skip, whole.exp_inf + skip, n}, own);
        at += n;
      }
    }
  });
  for (auto& [target, copy] : back) target.copy_(copy);
  return left;
}

}  // namespace nvae::adamax
