// adamax on the CPU: every parameter of an arena in one pass, its gradient read where autograd left it. The elements of all
// parameters stand in one long row, cut into chunks of equal length, which threads take in turn; no sum of the update crosses
// elements and those of squares are joined in the order of chunks, so that results depend neither on the number of threads nor
// on who takes what.
#include "adamax/adamax_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "adamax/adamax.h"
#include "common/isa.h"

namespace nvae::adamax {
namespace {

#define NVAE_KERNEL "adamax/adamax_kernel.h"
#include "common/each_isa.h"

using at::Tensor;

constexpr int64_t kChunk = 1 << 14;  // elements, in one thread's hands at a time
constexpr int64_t kShare = 1 << 16;  // elements a thread should find: fewer cost less than waking it

// A parameter; its first element is number `begin` of the row.
struct Part {
  Elements elements;
  float size;
  int64_t begin;
};

// What the layout says of one parameter.
struct Place {
  int64_t begin;
  at::IntArrayRef size, stride;
};

Place place_of(const int64_t* layout, int64_t number) {
  const int64_t* record = layout + layout[number];
  const size_t dim = static_cast<size_t>(record[1]);
  return {record[0], {record + 2, dim}, {record + 2 + dim, dim}};
}

bool plain(const Tensor& t) {
  return t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == at::kFloat;
}

// Equal strides where they matter: those of axes of length 1 do not.
bool same_order(const Tensor& t, at::IntArrayRef stride) {
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) != 1 && t.stride(d) != stride[d]) return false;
  return true;
}

void check(const Tensor& grad, const Tensor& param, int64_t number) {
  TORCH_CHECK(!grad.is_sparse(), "Adamax does not support sparse gradients");
  TORCH_CHECK(plain(grad) && grad.sizes() == param.sizes(), "adamax: params[", number, "] has shape ", param.sizes(),
              ", its grad ", grad.sizes(), " of type ", grad.scalar_type(), " on ", grad.device(),
              "; expected that shape, float32 on the CPU");
}

// Calls run(part, skip, n) for the pieces of chunk after chunk; a chunk is one thread's, its pieces come in order.
template <class Run>
void in_chunks(const std::vector<Part>& parts, int64_t total, const Run& run) {
  std::atomic<int64_t> next{0};  // chunks go to whoever is free: other programs may hold up a thread
  const int64_t tasks = std::min<int64_t>(at::get_num_threads(), (total + kShare - 1) / kShare);
  at::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
    const auto after = [](int64_t at, const Part& part) { return at < part.begin; };
    for (int64_t at; (at = next.fetch_add(kChunk)) < total;) {
      const int64_t end = std::min(total, at + kChunk), chunk = at / kChunk;
      for (auto part = std::upper_bound(parts.begin(), parts.end(), at, after) - 1; at < end; ++part) {
        const int64_t skip = at - part->begin, n = std::min(end - at, part->elements.n - skip);
        run(*part, skip, n, chunk);
        at += n;
      }
    }
  });
}

}  // namespace

Tensor place(const Tensor& flat, int64_t begin, at::IntArrayRef size, at::IntArrayRef stride) {
  char* data = static_cast<char*>(flat.data_ptr()) + begin * flat.element_size();
  return at::for_blob(data, size)
      .strides(stride)
      .deleter([flat](void*) {})  // holds flat
      .options(flat.options())
      .target_device(flat.device())
      .make_tensor();
}

Tensor squares(at::TensorList grads) {
  std::vector<Part> parts;
  std::vector<Tensor> copies;  // alive until the end
  parts.reserve(grads.size());
  int64_t total = 0;
  for (size_t i = 0; i < grads.size(); i++) {
    check(grads[i], grads[i], static_cast<int64_t>(i));
    if (grads[i].numel() == 0) continue;
    Elements e{};
    e.n = grads[i].numel();
    if (grads[i].is_non_overlapping_and_dense())
      e.grad = grads[i].const_data_ptr<float>();
    else
      e.grad = copies.emplace_back(grads[i].contiguous()).const_data_ptr<float>();
    parts.push_back({e, 0.0f, total});
    total += e.n;
  }
  std::vector<double> sums((total + kChunk - 1) / kChunk);
  const auto run = NVAE_SELECT(squares);
  in_chunks(parts, total, [&](const Part& part, int64_t skip, int64_t n, int64_t chunk) {
    sums[chunk] += run(part.elements.grad + skip, n);
  });
  double sum = 0.0;
  for (const double each : sums) sum += each;
  Tensor out = at::empty({}, at::dtype(at::kDouble));
  *out.mutable_data_ptr<double>() = sum;
  return out;
}

bool step_(at::TensorList params, at::TensorList grads, at::IntArrayRef numbers, const Tensor& layout, const Tensor& param,
           const Tensor& exp_avg, const Tensor& exp_inf, const std::optional<Tensor>& ema, const Tensor& steps,
           const std::optional<Tensor>& factor, const std::optional<Tensor>& take, double lr, double beta1, double beta2,
           double eps, double weight_decay, bool maximize, double ema_decay) {
  TORCH_CHECK(grads.size() == params.size() && numbers.size() == params.size(), "adamax: ", params.size(), " params, ",
              grads.size(), " grads, ", numbers.size(), " numbers; expected as many of each");
  const int64_t* where = layout.const_data_ptr<int64_t>();
  const float* base = param.const_data_ptr<float>();
  for (size_t i = 0; i < params.size(); i++) {
    const Place at = place_of(where, numbers[i]);
    const Tensor& p = params[i];
    if (!plain(p) || p.sizes() != at.size || p.strides() != at.stride) return false;
    if (p.numel() && p.const_data_ptr<float>() != base + at.begin) return false;
    check(grads[i], p, numbers[i]);
  }
  if (take && !*take->const_data_ptr<bool>()) return true;

  std::vector<Part> parts;
  std::vector<Tensor> copies;  // alive until the end
  parts.reserve(params.size());
  int64_t total = 0;
  for (size_t i = 0; i < params.size(); i++) {
    const Place at = place_of(where, numbers[i]);
    const Tensor &p = params[i], &g = grads[i];
    const double t = steps.mutable_data_ptr<float>()[numbers[i]] += 1.0f;
    const float size = static_cast<float>(-(lr / (1.0 - std::pow(beta1, t))));
    if (!p.is_inference()) p.unsafeGetTensorImpl()->bump_version();  // what torch's in-place operations tell autograd
    if (p.numel() == 0) continue;
    Elements e{};
    e.n = p.numel();
    if (same_order(g, at.stride))
      e.grad = g.const_data_ptr<float>();
    else
      e.grad = copies.emplace_back(at::empty_strided(at.size, at.stride, g.options()).copy_(g)).const_data_ptr<float>();
    e.param = param.mutable_data_ptr<float>() + at.begin;
    e.exp_avg = exp_avg.mutable_data_ptr<float>() + at.begin, e.exp_inf = exp_inf.mutable_data_ptr<float>() + at.begin;
    if (ema) e.ema = ema->mutable_data_ptr<float>() + at.begin;
    parts.push_back({e, size, total});
    total += e.n;
  }

  Step step{};
  step.weight = static_cast<float>(1.0 - beta1);
  step.beta2 = static_cast<float>(beta2), step.eps = static_cast<float>(eps);
  step.decay = static_cast<float>(weight_decay), step.ema_weight = static_cast<float>(1.0 - ema_decay);
  step.factor = (maximize ? -1.0f : 1.0f) * (factor ? *factor->const_data_ptr<float>() : 1.0f);
  const auto run = NVAE_SELECT(update);
  in_chunks(parts, total, [&](const Part& part, int64_t skip, int64_t n, int64_t) {
    const Elements& e = part.elements;
    Step own = step;
    own.size = part.size;
    run({e.param + skip, e.grad + skip, e.exp_avg + skip, e.exp_inf + skip, e.ema ? e.ema + skip : nullptr, n}, own);
  });
  return true;
}

}  // namespace nvae::adamax
