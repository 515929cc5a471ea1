// power_iteration on the CPU: any strides, float or bfloat16 storage, float arithmetic. A matrix is one task, done by one
// thread in a fixed order, so results do not depend on the thread count.
#include "power_iteration/power_iteration_cpu.h"

#include <ATen/ExpandUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "common/isa.h"
#include "power_iteration/power_iteration.h"

namespace nvae::power_iteration {
namespace {

#define NVAE_KERNEL "power_iteration/power_iteration_kernel.h"
#include "common/each_isa.h"

using at::Tensor;

constexpr int64_t kSerialElements = 1 << 14;  // less work than this in all is not worth waking threads for

// make_task() for each thread, and task(i) for every i, the largest sizes[i] first, whichever thread is free.
template <typename F>
void for_each_by_size(const std::vector<int64_t>& sizes, const F& make_task) {
  std::vector<int64_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  const int64_t count = static_cast<int64_t>(sizes.size());
  const int64_t threads = total < kSerialElements ? 1 : std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto task = make_task();
    for (int64_t i = next++; i < count; i = next++) task(order[i]);
  });
}

// Storage offsets of the elements of one row (all axes but the first), numbered in logical order.
void row_offsets(at::IntArrayRef sizes, at::IntArrayRef strides, std::vector<int64_t>& offsets) {
  offsets.assign(1, 0);
  for (size_t d = 1; d < sizes.size(); d++) {
    const size_t n = offsets.size();
    offsets.resize(n * sizes[d]);
    for (size_t i = n; i-- > 0;)  // from the end: what is overwritten has been read
      for (int64_t j = sizes[d]; j-- > 0;) offsets[i * sizes[d] + j] = offsets[i] + j * strides[d];
  }
}

template <typename T>
void copy_rows(const T* data, int64_t step, const std::vector<int64_t>& offsets, std::vector<float>& out) {
  const int64_t columns = offsets.size(), rows = out.size() / columns;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < columns; k++) out[r * columns + k] = static_cast<float>(data[r * step + offsets[k]]);
}

// The weight as a contiguous float matrix: in place, or copied to `scratch`.
Matrix matrix_of(const Tensor& w, std::vector<float>& scratch, std::vector<int64_t>& offsets) {
  const int64_t rows = w.size(0), columns = w.numel() / rows;
  if (w.scalar_type() == at::kFloat && w.is_contiguous()) return {w.const_data_ptr<float>(), rows, columns};
  scratch.resize(rows * columns);
  row_offsets(w.sizes(), w.strides(), offsets);
  if (w.scalar_type() == at::kFloat)
    copy_rows(w.const_data_ptr<float>(), w.stride(0), offsets, scratch);
  else
    copy_rows(w.const_data_ptr<at::BFloat16>(), w.stride(0), offsets, scratch);
  return {scratch.data(), rows, columns};
}

// max(norm, eps), NaN for NaN.
float at_least(float norm, float eps) { return norm <= eps ? eps : norm; }

// Moves u and v, returns sigma. With s = W v not yet divided by d = max(|s|, eps), the next W^T u is W^T s / d, so that
// one pass over W makes both products of a round.
float iterate(const Matrix& m, float* u, float* v, int64_t iterations, float eps, std::vector<float>& scratch) {
  const auto sweep = NVAE_SELECT(sweep);
  const auto dot = NVAE_SELECT(dot);
  const auto divide = NVAE_SELECT(divide);
  scratch.resize(std::max(m.rows, m.columns));
  float* s = scratch.data();
  if (iterations == 0) {
    sweep(m, v, s, nullptr);
    return dot(u, s, m.rows);
  }
  sweep(m, nullptr, u, v);
  const auto to_unit = [&](float* a, int64_t n) { divide(a, at_least(std::sqrt(dot(a, a, n)), eps), n, a); };
  to_unit(v, m.columns);
  for (int64_t i = 1; i < iterations; i++) {
    float* sum = scratch.data();
    sweep(m, v, u, sum);
    divide(sum, at_least(std::sqrt(dot(u, u, m.rows)), eps), m.columns, v);
    to_unit(v, m.columns);
  }
  sweep(m, v, s, nullptr);
  divide(s, at_least(std::sqrt(dot(s, s, m.rows)), eps), m.rows, u);
  return dot(u, s, m.rows);
}

void copy_vector(const Tensor& from, float* to) {
  const Tensor wide = from.to(at::kFloat);
  const float* data = wide.const_data_ptr<float>();
  for (int64_t i = 0; i < wide.numel(); i++) to[i] = data[i * wide.stride(0)];
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward_cpu(at::TensorList weights, at::TensorList u, at::TensorList v,
                                               int64_t iterations, double eps) {
  const size_t count = weights.size();
  TORCH_CHECK(count > 0 && u.size() == count && v.size() == count, "power_iteration takes one u and one v per weight");
  std::vector<int64_t> sizes(count), u_start(count + 1), v_start(count + 1);
  for (size_t i = 0; i < count; i++) {
    const Tensor& w = weights[i];
    TORCH_CHECK(w.device().is_cpu() && u[i].device().is_cpu() && v[i].device().is_cpu(),
                "power_iteration: weight ", i, " on ", w.device(), ", its u on ", u[i].device(), ", its v on ",
                v[i].device(), ": move all to the CPU");
    TORCH_CHECK(w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16,
                "power_iteration: weight ", i, " is ", w.scalar_type(), ": expected float32 or bfloat16");
    TORCH_CHECK(w.dim() >= 2 && w.numel() > 0, "power_iteration: weight ", i, " needs two axes or more and elements");
    sizes[i] = w.numel();
    const int64_t rows = w.size(0), columns = w.numel() / rows;
    TORCH_CHECK(u[i].dim() == 1 && v[i].dim() == 1 && u[i].numel() == rows && v[i].numel() == columns,
                "power_iteration: u or v ", i, " does not fit its weight");
    u_start[i + 1] = u_start[i] + rows;
    v_start[i + 1] = v_start[i] + columns;
  }
  const auto options = weights[0].options().dtype(at::kFloat);
  Tensor sigma = at::empty({static_cast<int64_t>(count)}, options);
  Tensor new_u = at::empty({u_start[count]}, options), new_v = at::empty({v_start[count]}, options);
  float *sigma_out = sigma.data_ptr<float>(), *u_out = new_u.data_ptr<float>(), *v_out = new_v.data_ptr<float>();
  for (size_t i = 0; i < count; i++) {
    copy_vector(u[i], u_out + u_start[i]);
    if (iterations == 0) copy_vector(v[i], v_out + v_start[i]);
  }
  for_each_by_size(sizes, [&] {
    return [&, copy = std::vector<float>(), scratch = std::vector<float>(),
            offsets = std::vector<int64_t>()](int64_t i) mutable {
      const Matrix m = matrix_of(weights[i], copy, offsets);
      sigma_out[i] = iterate(m, u_out + u_start[i], v_out + v_start[i], iterations, static_cast<float>(eps), scratch);
    };
  });
  return {sigma, new_u, new_v};
}

std::vector<Tensor> add_cpu(const c10::List<std::optional<Tensor>>& others, const Tensor& dsigma, const Tensor& u,
                            const Tensor& v, at::IntArrayRef layouts) {
  const size_t count = dsigma.numel();
  TORCH_CHECK(others.empty() || others.size() == count, "power_iteration: ", others.size(), " gradients of ", count, " weights");
  std::vector<Tensor> grads(count), given(count);
  std::vector<int64_t> elements(count), u_start(count + 1), v_start(count + 1);
  for (size_t i = 0; i < count; i++) {
    const int64_t axes = layouts.empty() ? -1 : layouts[0];
    TORCH_CHECK(axes >= 2 && static_cast<int64_t>(layouts.size()) > 2 * axes, "power_iteration: too few layouts");
    const auto sizes = layouts.slice(1, axes), strides = layouts.slice(1 + axes, axes);
    layouts = layouts.slice(1 + 2 * axes);
    // A dense weight's own strides (also along axes of size 1), else those that empty_like would choose.
    const std::vector<int64_t> dense = at::infer_dense_strides(sizes, strides);
    bool same = true;
    for (int64_t d = 0; d < axes; d++) same &= sizes[d] == 1 || strides[d] == dense[d];
    grads[i] = at::empty_strided(sizes, same ? strides : at::IntArrayRef(dense), u.options());
    elements[i] = grads[i].numel();
    u_start[i + 1] = u_start[i] + sizes[0];
    v_start[i + 1] = v_start[i] + elements[i] / sizes[0];
    if (const std::optional<Tensor> other = others.empty() ? std::nullopt : others.get(i)) {
      TORCH_CHECK(other->sizes() == sizes && other->scalar_type() == at::kFloat, "power_iteration: gradient ", i,
                  " has shape ", other->sizes(), " and type ", other->scalar_type(), "; expected ", sizes, " and float32");
      bool ordered = true;
      for (int64_t d = 0; d < axes; d++) ordered &= sizes[d] == 1 || other->stride(d) == grads[i].stride(d);
      given[i] = ordered ? *other : at::empty_strided(sizes, grads[i].strides(), u.options()).copy_(*other);
    }
  }
  TORCH_CHECK(layouts.empty() && u.numel() == u_start[count] && v.numel() == v_start[count],
              "power_iteration: the gradient, u and v do not fit the weights");
  const auto scale = NVAE_SELECT(scale);
  const auto scale_add = NVAE_SELECT(scale_add);
  const Tensor flat[] = {dsigma.contiguous(), u.contiguous(), v.contiguous()};
  const float *factor = flat[0].const_data_ptr<float>(), *u_in = flat[1].const_data_ptr<float>(),
              *v_in = flat[2].const_data_ptr<float>();
  for_each_by_size(elements, [&] {
    return [&, row = std::vector<float>(), offsets = std::vector<int64_t>()](int64_t i) mutable {
      const Tensor& g = grads[i];
      float* out = g.data_ptr<float>();
      const float* other = given[i].defined() ? given[i].const_data_ptr<float>() : nullptr;
      const int64_t rows = g.size(0), columns = elements[i] / rows, step = g.stride(0);
      const float *left = u_in + u_start[i], *right = v_in + v_start[i];
      // Where a row lies in one piece, v takes the order that its elements have in memory.
      const bool whole = g.is_contiguous() || rows == 1 || step == columns;
      row.resize(columns);
      if (!g.is_contiguous()) row_offsets(g.sizes(), g.strides(), offsets);
      if (whole && !g.is_contiguous()) {
        for (int64_t k = 0; k < columns; k++) row[offsets[k]] = right[k];
        right = row.data();
      }
      for (int64_t r = 0; r < rows; r++) {
        const float share = factor[i] * left[r];
        if (whole && other) {
          scale_add(right, share, other + r * columns, columns, out + r * columns);
        } else if (whole) {
          scale(right, share, columns, out + r * columns);
        } else {
          for (int64_t k = 0; k < columns; k++) {
            const int64_t at = r * step + offsets[k];
            out[at] = other ? other[at] + share * right[k] : share * right[k];
          }
        }
      }
    };
  });
  return grads;
}

std::vector<Tensor> backward_cpu(const Tensor& dsigma, const Tensor& u, const Tensor& v, at::IntArrayRef layouts) {
  return add_cpu(c10::List<std::optional<Tensor>>(), dsigma, u, v, layouts);
}

}  // namespace nvae::power_iteration
