// Tiles of [B, Z, h, w] tensors of any strides as float arrays, and the order of the work. Included inside an anonymous
// namespace, after the kernels (common/each_isa.h).

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
      alignas(64) float scratch[15][kTile];
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
