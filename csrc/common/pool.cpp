#include "common/pool.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace nvae {
namespace {

constexpr size_t kHeader = 64;  // in front of a block: its size; keeps the data on a cache line
constexpr size_t kGrain = 1 << 16;

struct Kept {
  char* data;
  uint64_t since;
};

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (bytes + kGrain - 1) / kGrain * kGrain;
    const std::lock_guard<std::mutex> lock(mutex_);
    char* block = nullptr;
    const auto found = kept_.lower_bound(size);
    if (found != kept_.end() && found->first - size <= size / 8) {
      block = found->second.data;
      kept_bytes_ -= found->first;
      used_ += found->first;
      kept_.erase(found);
    } else {
      used_ += size;
      most_ = std::max(most_, used_);
      evict(most_ + most_ / 2);
      block = static_cast<char*>(std::aligned_alloc(kHeader, kHeader + size));
      if (!block) {  // what is kept may be what is missing
        evict(0);
        block = static_cast<char*>(std::aligned_alloc(kHeader, kHeader + size));
      }
      if (!block) used_ -= size;
      TORCH_CHECK_WITH(OutOfMemoryError, block, "nvae_fast: no memory for a tensor of ", bytes, " bytes");
      std::memcpy(block, &size, sizeof(size));
    }
    most_ = std::max(most_, used_);
    return {block + kHeader, block, &Pool::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the data and its block have different addresses
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  size_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t bytes = kept_bytes_;
    evict(0);
    most_ = used_;
    return bytes;
  }

  static Pool& instance() {
    static Pool* one = new Pool;  // outlives every tensor
    return *one;
  }

 private:
  static void release(void* block) {
    size_t size;
    std::memcpy(&size, block, sizeof(size));
    Pool& p = instance();
    const std::lock_guard<std::mutex> lock(p.mutex_);
    p.used_ -= size;
    p.kept_bytes_ += size;
    p.kept_.emplace(size, Kept{static_cast<char*>(block), p.clock_++});
  }

  // Frees kept blocks, those first that have waited longest, until the others and the used ones fit into `limit`.
  void evict(size_t limit) {
    while (!kept_.empty() && used_ + kept_bytes_ > limit) {
      const auto older = [](const auto& a, const auto& b) { return a.second.since < b.second.since; };
      const auto oldest = std::min_element(kept_.begin(), kept_.end(), older);
      kept_bytes_ -= oldest->first;
      std::free(oldest->second.data);
      kept_.erase(oldest);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, Kept> kept_;
  uint64_t clock_ = 0;
  size_t used_ = 0, kept_bytes_ = 0, most_ = 0;
};

}  // namespace

c10::Allocator& pool() { return Pool::instance(); }
size_t release_pool() { return Pool::instance().empty(); }

}  // namespace nvae
