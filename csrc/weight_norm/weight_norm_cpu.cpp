// weight_norm on the CPU: float32, all weights in one parallel loop. A row is computed by one thread in the order of its
// memory, so results do not depend on the thread count. The order of elements inside a row means nothing as long as mask,
// gradient and result share it: any dense layout with the output channel outermost (contiguous, channels-last) runs in place,
// others are copied.
#include "weight_norm/weight_norm_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "weight_norm/weight_norm.h"

namespace nvae::weight_norm {
namespace {

#define NVAE_KERNEL "weight_norm/weight_norm_kernel.h"
#include "common/each_isa.h"

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // elements that are worth a thread

// The same memory order: equal strides, but for axes of size 1.
bool same_order(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

bool rows_are_dense(const Tensor& w) {
  return w.is_non_overlapping_and_dense() && (w.size(0) <= 1 || w.stride(0) * w.size(0) == w.numel());
}

Tensor in_order_of(const Tensor& layout, const Tensor& t) {
  return same_order(layout, t) ? t : at::empty_strided(layout.sizes(), layout.strides(), t.options()).copy_(t);
}

// One weight of the list: rows of `length` floats, the same way in memory in all four tensors.
struct Item {
  Tensor weight, mask, grad, out;
  int64_t rows, length, first_element;
  const float *w, *m = nullptr, *g = nullptr, *log_norm;
  float *y, *dlog_norm = nullptr;
  int64_t log_norm_stride, dlog_norm_stride = 0;

  // Results go to `target` where its memory has the order of the rows, else to a buffer that `finish` copies from.
  Item(const Tensor& given, const Tensor& given_log_norm, const MaybeTensor& given_mask, const Tensor& target, int64_t first)
      : weight(rows_are_dense(given) ? given : given.contiguous()),
        out(same_order(weight, target) ? target : at::empty_like(weight)),
        rows(given.size(0)), length(rows ? given.numel() / rows : 0), first_element(first),
        w(weight.const_data_ptr<float>()), log_norm(given_log_norm.const_data_ptr<float>()), y(out.data_ptr<float>()),
        log_norm_stride(given_log_norm.stride(0)) {
    if (given_mask) mask = in_order_of(weight, *given_mask), m = mask.const_data_ptr<float>();
  }

  void set_gradients(const Tensor& given, Tensor& dlog) {
    grad = in_order_of(weight, given), g = grad.const_data_ptr<float>();
    dlog_norm = dlog.data_ptr<float>(), dlog_norm_stride = dlog.stride(0);
    if (!length) dlog.zero_();  // no element, no visit
  }

  double exp_log_norm(int64_t row) const { return std::exp(static_cast<double>(log_norm[row * log_norm_stride])); }

  void finish(const Tensor& target) const {
    if (!out.is_same(target)) target.copy_(out);
  }
};

void check(const Tensor& t, at::IntArrayRef sizes, const char* name, size_t i) {
  TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == at::kFloat && t.device().is_cpu(), "weight_norm: ", name, "[", i,
              "] of shape ", t.sizes(), " and type ", t.scalar_type(), " where ", sizes,
              " and float32 on the CPU was expected");
}

void check_all(at::TensorList weights, at::TensorList log_norms, const MaybeTensors& masks) {
  TORCH_CHECK(weights.size() == log_norms.size() && weights.size() == masks.size(), "weight_norm: ", weights.size(),
              " weights, ", log_norms.size(), " log_norms, ", masks.size(), " masks: expected one of each");
  for (size_t i = 0; i < weights.size(); i++) {
    const Tensor& w = weights[i];
    TORCH_CHECK(w.dim() >= 2, "weight_norm: weights[", i, "] has shape ", w.sizes(), ": expected two axes or more");
    std::vector<int64_t> shape(w.dim(), 1);
    shape[0] = w.size(0);
    check(w, w.sizes(), "weights", i);
    check(log_norms[i], shape, "log_norms", i);
    const MaybeTensor mask = masks.get(i);
    if (mask) check(*mask, w.sizes(), "masks", i);
  }
}

// f(item, row) for every row, in parallel. Threads share the elements evenly; a row is its first element's thread's.
template <typename F>
void for_each_row(const std::vector<Item>& items, const F& f) {
  const int64_t total = items.empty() ? 0 : items.back().first_element + items.back().rows * items.back().length;
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    auto item = std::upper_bound(items.begin(), items.end(), begin, [](int64_t element, const Item& candidate) {
      return element < candidate.first_element + candidate.rows * candidate.length;
    });
    for (; item != items.end() && item->first_element < end; ++item) {
      if (!item->length) continue;
      const int64_t skipped = std::max<int64_t>(begin - item->first_element, 0);
      const int64_t last = std::min(item->rows * item->length, end - item->first_element);
      for (int64_t row = (skipped + item->length - 1) / item->length; row * item->length < last; row++) f(*item, row);
    }
  });
}

}  // namespace

std::vector<Tensor> forward_cpu(at::TensorList weights, at::TensorList log_norms, const MaybeTensors& masks, double eps) {
  check_all(weights, log_norms, masks);
  std::vector<Tensor> outputs;
  std::vector<Item> items;
  outputs.reserve(weights.size());
  items.reserve(weights.size());
  int64_t elements = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    outputs.push_back(at::empty_like(weights[i]));
    items.emplace_back(weights[i], log_norms[i], masks.get(i), outputs.back(), elements);
    elements += weights[i].numel();
  }
  const auto measure = NVAE_SELECT(squares);
  const auto write = NVAE_SELECT(scale);
  for_each_row(items, [&](const Item& item, int64_t row) {
    const int64_t at = row * item.length;
    const float *w = item.w + at, *m = item.m ? item.m + at : nullptr;
    const double norm = std::sqrt(measure(w, m, item.length));
    write(w, m, item.exp_log_norm(row) / (norm + eps), item.y + at, item.length);
  });
  for (size_t i = 0; i < items.size(); i++) items[i].finish(outputs[i]);
  return outputs;
}

std::vector<Tensor> backward_cpu(const MaybeTensors& grads, at::TensorList weights, at::TensorList log_norms,
                                 const MaybeTensors& masks, double eps) {
  check_all(weights, log_norms, masks);
  TORCH_CHECK(grads.size() == weights.size(), "weight_norm: ", grads.size(), " gradients of ", weights.size(), " weights");
  std::vector<Tensor> outputs, log_outputs;
  std::vector<Item> items;
  outputs.reserve(2 * weights.size());
  items.reserve(weights.size());
  int64_t elements = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const MaybeTensor grad = grads.get(i);
    if (!grad) continue;
    check(*grad, weights[i].sizes(), "grads", i);
    outputs.push_back(at::empty_like(weights[i]));
    log_outputs.push_back(at::empty_like(log_norms[i]));
    items.emplace_back(weights[i], log_norms[i], masks.get(i), outputs.back(), elements);
    items.back().set_gradients(*grad, log_outputs.back());
    elements += weights[i].numel();
  }
  const auto measure = NVAE_SELECT(sums);
  const auto write = NVAE_SELECT(combine);
  for_each_row(items, [&](const Item& item, int64_t row) {
    const int64_t at = row * item.length;
    const float *w = item.w + at, *m = item.m ? item.m + at : nullptr, *g = item.g + at;
    const Sums s = measure(g, w, m, item.length);
    const double norm = std::sqrt(s.squares), a = item.exp_log_norm(row) / (norm + eps);
    const double b = norm == 0.0 ? 0.0 : a * s.product / (norm * (norm + eps));
    item.dlog_norm[row * item.dlog_norm_stride] = static_cast<float>(a * s.product);
    write(g, w, m, a, b, item.y + at, item.length);
  });
  for (size_t i = 0; i < items.size(); i++) items[i].finish(outputs[i]);
  outputs.insert(outputs.end(), log_outputs.begin(), log_outputs.end());
  return outputs;
}

}  // namespace nvae::weight_norm
