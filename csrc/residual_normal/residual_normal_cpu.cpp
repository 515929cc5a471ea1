// residual_normal on the CPU: any strides, float or bfloat16 storage, float arithmetic, one pass each way. A row (all of
// one batch element's channel) is summed in an order that depends on its length alone: not on the threads, not on the strides.
#include "residual_normal/residual_normal_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "common/isa.h"
#include "common/math.h"
#include "residual_normal/residual_normal.h"

namespace nvae::residual_normal {
namespace {

#define NVAE_KERNEL "residual_normal/residual_normal_kernel.h"
#include "common/each_isa.h"

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A [B, Z, h, w] tensor: base pointer and strides; a null pointer for an absent one.
template <typename T>
struct Image {
  T* data = nullptr;
  int64_t stride_b = 0, stride_z = 0, stride_h = 0, stride_w = 0, w = 1;

  Image() = default;
  explicit Image(const Tensor& t)
      : data(t.data_ptr<std::remove_const_t<T>>()),
        stride_b(t.stride(0)), stride_z(t.stride(1)), stride_h(t.stride(2)), stride_w(t.stride(3)),
        w(std::max<int64_t>(t.size(3), 1)) {
    if (stride_h == w * stride_w) w = std::max<int64_t>(t.size(2) * t.size(3), 1);  // the map is one line
  }
  explicit Image(const MaybeTensor& t) : Image(t ? Image(*t) : Image()) {}
};

// `pixels` pixels of `width` channels of an image, numbered [pixel][channel].
struct Tile {
  int64_t b, channel, start;
  int width, pixels;

  int size() const { return width * pixels; }
  int padded() const { return (size() + kLanes - 1) / kLanes * kLanes; }
};

// f(element of the image, its number in the tile) for all elements of the tile.
template <typename T, typename F>
void visit(const Image<T>& image, const Tile& tile, const F& f) {
  T* const base = image.data + tile.b * image.stride_b + tile.channel * image.stride_z;
  const int64_t sz = image.stride_z, sw = image.stride_w;
  const int width = tile.width;
  for (int done = 0, run; done < tile.pixels; done += run) {
    const int64_t column = (tile.start + done) % image.w;
    run = static_cast<int>(std::min<int64_t>(image.w - column, tile.pixels - done));
    T* const line = base + (tile.start + done) / image.w * image.stride_h + column * sw;
    if (sz == 1) {
      for (int p = 0; p < run; p++)
        for (int c = 0; c < width; c++) f(line[p * sw + c], (done + p) * width + c);
    } else {
      for (int c = 0; c < width; c++)
        for (int p = 0; p < run; p++) f(line[p * sw + c * sz], (done + p) * width + c);
    }
  }
}

// The tile's first element, where its pixels are stride_w apart; else null.
template <typename T>
T* straight(const Image<T>& image, const Tile& tile) {
  const int64_t row = tile.start / image.w, column = tile.start % image.w;
  if (column + tile.pixels > image.w) return nullptr;
  return image.data + tile.b * image.stride_b + tile.channel * image.stride_z + row * image.stride_h + column * image.stride_w;
}

// Where the tile stands as whole vectors of floats in the order of its numbers; else null.
template <typename T>
T* in_place(const Image<T>& image, const Tile& tile) {
  const bool dense = image.stride_w == tile.width && (tile.width == 1 || image.stride_z == 1);
  return sizeof(T) == sizeof(float) && dense && tile.size() == tile.padded() ? straight(image, tile) : nullptr;
}

template <typename T>
const float* load(const Image<const T>& image, const Tile& tile, float* scratch) {
  if (!image.data) return nullptr;
  if (const T* there = in_place(image, tile)) return reinterpret_cast<const float*>(there);
  if constexpr (std::is_same_v<T, float>) {
    const float* from = image.stride_z == 1 && tile.width >= kLanes ? straight(image, tile) : nullptr;
    if (from) {
      NVAE_SELECT(copy_pixels)(from, image.stride_w, tile.pixels, tile.width, scratch);
      return scratch;
    }
  }
  visit(image, tile, [&](const T& x, int i) { scratch[i] = static_cast<float>(x); });
  return scratch;
}

// Where the kernel may put the tile: in place, or `scratch`, which `store` then copies out.
template <typename T>
float* target(const Image<T>& image, const Tile& tile, float* scratch) {
  if (!image.data) return nullptr;
  T* const there = in_place(image, tile);
  return there ? reinterpret_cast<float*>(there) : scratch;
}

template <typename T>
void store(const Image<T>& image, const Tile& tile, const float* values) {
  if (image.data && !in_place(image, tile)) visit(image, tile, [&](T& x, int i) { x = static_cast<T>(values[i]); });
}

using Scratch = float (*)[kTile];

template <typename T>
struct Parameters {
  Image<const T> mu_q, log_sigma_q, mu_p, log_sigma_p;
  Image<const float> noise;
  bool residual;

  Inputs read(const Tile& tile, Scratch scratch) const {
    return {load(mu_q, tile, scratch[0]), load(log_sigma_q, tile, scratch[1]), load(mu_p, tile, scratch[2]),
            load(log_sigma_p, tile, scratch[3]), load(noise, tile, scratch[4]), tile.padded(), residual};
  }
};

// The work: one block of pixels of a group of channels of one image to a task. `width` channels share a task where a pixel's
// channels are neighbours in memory, else a task has one.
struct Plan {
  int64_t batch, channels, area, width, groups, blocks;

  explicit Plan(const Tensor& like)
      : batch(like.size(0)), channels(like.size(1)), area(like.size(2) * like.size(3)), width(1), groups(channels) {
    if (channels > 1 && like.stride(1) == 1) {
      groups = (channels + kWidth - 1) / kWidth;
      width = (channels + groups - 1) / groups;
    }
    blocks = (area + kBlock - 1) / kBlock;
  }

  // f(block, first tile of the task, scratch), in parallel, a few thousand elements at least to a thread.
  template <typename F>
  void run(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 4096 / (width * std::clamp<int64_t>(area, 1, kBlock)));
    at::parallel_for(0, batch * groups * blocks, grain, [&](int64_t begin, int64_t end) {
      alignas(64) float scratch[13][kTile];
      for (int64_t i = begin; i < end; i++) {
        const int64_t block = i % blocks, channel = i / blocks % groups * width;
        f(block, Tile{i / blocks / groups, channel, block * kBlock, static_cast<int>(std::min(width, channels - channel)), 0}, scratch);
      }
    });
  }

  // f(tile) for the tiles of a task.
  template <typename F>
  void tiles(Tile tile, const F& f) const {
    const int64_t end = std::min<int64_t>(tile.start + kBlock, area), step = kWidth / tile.width * kLanes;
    for (; tile.start < end; tile.start += step) {
      tile.pixels = static_cast<int>(std::min(step, end - tile.start));
      f(tile);
    }
  }
};

template <typename T>
void forward(const Parameters<T>& in, const Tensor& z, const Tensor (&sums)[3]) {
  const auto run = NVAE_SELECT(forward_tile);
  const auto add = NVAE_SELECT(add_tile);
  const auto join = NVAE_SELECT(join_lanes);
  const Plan plan(z);
  const Image<T> out(z);
  const int64_t rows = plan.batch * plan.channels;
  // Sums by block; with one block they are the results.
  Tensor parts[3];
  float* part[3];
  for (int k = 0; k < 3; k++) {
    parts[k] = plan.blocks == 1 ? sums[k] : at::empty({plan.blocks, rows}, sums[k].options());
    part[k] = parts[k].data_ptr<float>();
  }
  plan.run([&](int64_t block, const Tile& task, Scratch scratch) {
    alignas(64) float lanes[3][kTile];
    for (float* row : lanes) std::fill_n(row, kLanes * task.width, 0.0f);
    plan.tiles(task, [&](const Tile& tile) {
      const Outputs o{target(out, tile, scratch[5]), scratch[6], scratch[7], scratch[8]};
      run(in.read(tile, scratch), o);
      store(out, tile, o.z);
      for (int k = 0; k < 3; k++) {
        std::fill(scratch[6 + k] + tile.size(), scratch[6 + k] + tile.padded(), 0.0f);
        add(scratch[6 + k], tile.size(), tile.width, lanes[k]);
      }
    });
    for (int k = 0; k < 3; k++) {
      join(lanes[k], task.width);
      std::copy_n(lanes[k], task.width, part[k] + block * rows + task.b * plan.channels + task.channel);
    }
  });
  if (plan.blocks == 1) return;
  for (int k = 0; k < 3; k++) {
    float* to = sums[k].data_ptr<float>();
    for (int64_t i = 0; i < rows; i++) {
      double sum = 0.0;
      for (int64_t block = 0; block < plan.blocks; block++) sum += part[k][block * rows + i];
      to[i] = static_cast<float>(sum);
    }
  }
}

template <typename T>
void backward(const Parameters<T>& in, const MaybeTensor& dz, const MaybeTensor (&sums)[3], const std::vector<Tensor>& outputs) {
  const auto run = NVAE_SELECT(backward_tile);
  const Plan plan(outputs[0]);
  const Image<const T> dz_image(dz);
  Image<T> out[4];
  for (size_t k = 0; k < outputs.size(); k++) out[k] = Image<T>(outputs[k]);
  alignas(64) static const float zeros[kTile] = {};
  plan.run([&](int64_t, const Tile& task, Scratch scratch) {
    const float* rows[3];
    for (int k = 0; k < 3; k++) {
      rows[k] = sums[k] ? scratch[6 + k] : zeros;
      if (!sums[k]) continue;
      const float* from = sums[k]->const_data_ptr<float>() + task.b * sums[k]->stride(0) + task.channel * sums[k]->stride(1);
      const int64_t pixels = std::min({plan.area, int64_t{kBlock}, int64_t{kWidth / task.width * kLanes}});
      if (task.width == 1) std::fill_n(scratch[6 + k], pixels, *from);
      else
        for (int c = 0; c < task.width; c++)
          for (int64_t i = 0; i < pixels; i++) scratch[6 + k][i * task.width + c] = from[c * sums[k]->stride(1)];
    }
    plan.tiles(task, [&](const Tile& tile) {
      float* to[4];
      for (int k = 0; k < 4; k++) to[k] = target(out[k], tile, scratch[9 + k]);
      run(in.read(tile, scratch), {dz ? load(dz_image, tile, scratch[5]) : zeros, rows[0], rows[1], rows[2], to[0], to[1], to[2], to[3]});
      for (int k = 0; k < 4; k++) store(out[k], tile, to[k]);
    });
  });
}

template <typename F>
void with_dtype(const Tensor& t, const F& f) {
  if (t.scalar_type() == at::kFloat) return f(float{});
  TORCH_CHECK(t.scalar_type() == at::kBFloat16, "residual_normal takes float32 or bfloat16, not ", t.scalar_type());
  f(at::BFloat16{});
}

void check(const Tensor& model, const MaybeTensor& t, at::ScalarType dtype) {
  TORCH_CHECK(!t || (t->sizes() == model.sizes() && t->scalar_type() == dtype && t->device().is_cpu()),
              "residual_normal: a tensor of shape ", t->sizes(), " and type ", t->scalar_type(), " where ", model.sizes(),
              " and ", dtype, " on the CPU was expected");
}

void check_parameters(const Tensor& mu_q, const Tensor& log_sigma_q, const MaybeTensor& mu_p,
                      const MaybeTensor& log_sigma_p, const Tensor& noise) {
  TORCH_CHECK(mu_q.dim() == 4, "residual_normal takes [B, Z, h, w], not ", mu_q.sizes());
  TORCH_CHECK(mu_p.has_value() == log_sigma_p.has_value(), "residual_normal takes both mu_p and log_sigma_p, or neither");
  check(mu_q, log_sigma_q, mu_q.scalar_type());
  check(mu_q, mu_p, mu_q.scalar_type());
  check(mu_q, log_sigma_p, mu_q.scalar_type());
  check(mu_q, noise, at::kFloat);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& mu_q, const Tensor& log_sigma_q,
                                                       const MaybeTensor& mu_p, const MaybeTensor& log_sigma_p,
                                                       const Tensor& noise, bool residual) {
  check_parameters(mu_q, log_sigma_q, mu_p, log_sigma_p, noise);
  Tensor z = at::empty_like(mu_q);
  Tensor sums[3];
  for (Tensor& s : sums) s = at::empty({mu_q.size(0), mu_q.size(1)}, mu_q.options().dtype(at::kFloat));
  with_dtype(mu_q, [&](auto tag) {
    using T = decltype(tag);
    forward(Parameters<T>{Image<const T>(mu_q), Image<const T>(log_sigma_q), Image<const T>(mu_p),
                          Image<const T>(log_sigma_p), Image<const float>(noise), residual},
            z, sums);
  });
  return {z, sums[0], sums[1], sums[2]};
}

std::vector<Tensor> backward_cpu(const MaybeTensor& dz, const MaybeTensor& dkl, const MaybeTensor& dlog_q,
                                 const MaybeTensor& dlog_p, const Tensor& mu_q, const Tensor& log_sigma_q,
                                 const MaybeTensor& mu_p, const MaybeTensor& log_sigma_p, const Tensor& noise,
                                 bool residual) {
  check_parameters(mu_q, log_sigma_q, mu_p, log_sigma_p, noise);
  check(mu_q, dz, mu_q.scalar_type());
  std::vector<Tensor> grads{at::empty_like(mu_q), at::empty_like(log_sigma_q)};
  if (mu_p) grads.push_back(at::empty_like(*mu_p)), grads.push_back(at::empty_like(*log_sigma_p));
  const MaybeTensor sums[3] = {dkl, dlog_q, dlog_p};
  with_dtype(mu_q, [&](auto tag) {
    using T = decltype(tag);
    backward(Parameters<T>{Image<const T>(mu_q), Image<const T>(log_sigma_q), Image<const T>(mu_p),
                           Image<const T>(log_sigma_p), Image<const float>(noise), residual},
             dz, sums, grads);
  });
  return grads;
}

}  // namespace nvae::residual_normal
