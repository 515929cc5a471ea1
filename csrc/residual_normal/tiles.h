// Tiles of [B, Z, h, w] tensors of any strides as float arrays, the order of the work, and sums over rows. Included inside an
// anonymous namespace, after the kernels (common/each_isa.h).

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
      alignas(64) float scratch[17][kTile];
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

alignas(64) const float kZeros[kTile] = {};

// For each element of a tile of the task, that of its row in sums [B, Z]; zeros where there is none.
const float* of_rows(const MaybeTensor& sums, const Plan& plan, const Tile& task, float* scratch) {
  if (!sums) return kZeros;
  const float* from = sums->const_data_ptr<float>() + task.b * sums->stride(0) + task.channel * sums->stride(1);
  const int64_t pixels = std::min({plan.area, int64_t{kBlock}, int64_t{kWidth / task.width * kLanes}});
  if (task.width == 1) std::fill_n(scratch, pixels, *from);
  else
    for (int c = 0; c < task.width; c++)
      for (int64_t i = 0; i < pixels; i++) scratch[i * task.width + c] = from[c * sums->stride(1)];
  return scratch;
}

template <int N>
using Rows = std::array<const float*, N>;

// Those of some sums, in scratches from `first` on.
template <int N>
Rows<N> of_rows(const MaybeTensor (&sums)[N], const Plan& plan, const Tile& task, Scratch scratch, int first) {
  Rows<N> found;
  for (int k = 0; k < N; k++) found[k] = of_rows(sums[k], plan, task, scratch[first + k]);
  return found;
}

// sums[k] [B, Z] = the sums over space of terms[k], where f(tile, scratch, rows, terms) leaves those of a tile's elements; or
// puts a pointer to them, with room for whole vectors. rows: what `of(task, scratch)` returns.
template <int N, typename G, typename F>
void sum_rows(const Plan& plan, const Tensor (&sums)[N], const G& of, const F& f) {
  const auto add = NVAE_SELECT(add_tile);
  const auto join = NVAE_SELECT(join_lanes);
  const int64_t rows = plan.batch * plan.channels;
  // Sums by block; with one block they are the results.
  Tensor parts[N];
  float* part[N];
  for (int k = 0; k < N; k++) {
    parts[k] = plan.blocks == 1 ? sums[k] : at::empty({plan.blocks, rows}, sums[k].options());
    part[k] = parts[k].template data_ptr<float>();
  }
  plan.run([&](int64_t block, const Tile& task, Scratch scratch) {
    alignas(64) float lanes[N][kTile], space[N][kTile];
    for (float* row : lanes) std::fill_n(row, kLanes * task.width, 0.0f);
    const auto rows_of_task = of(task, scratch);
    plan.tiles(task, [&](const Tile& tile) {
      float* terms[N];
      for (int k = 0; k < N; k++) terms[k] = space[k];
      f(tile, scratch, rows_of_task, terms);
      for (int k = 0; k < N; k++) {
        std::fill(terms[k] + tile.size(), terms[k] + tile.padded(), 0.0f);
        add(terms[k], tile.size(), tile.width, lanes[k]);
      }
    });
    for (int k = 0; k < N; k++) {
      join(lanes[k], task.width);
      std::copy_n(lanes[k], task.width, part[k] + block * rows + task.b * plan.channels + task.channel);
    }
  });
  if (plan.blocks == 1) return;
  for (int k = 0; k < N; k++) {
    float* to = sums[k].template data_ptr<float>();
    for (int64_t i = 0; i < rows; i++) {
      double sum = 0.0;
      for (int64_t block = 0; block < plan.blocks; block++) sum += part[k][block * rows + i];
      to[i] = static_cast<float>(sum);
    }
  }
}
