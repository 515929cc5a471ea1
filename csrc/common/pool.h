// Memory for large outputs of the native ops, kept when they are freed. A fresh block costs a page fault for every 4 KiB, which on
// a virtual machine took longer than the kernel that fills it: [16, 384, 16, 16], BN + Swish + depthwise forward and backward,
// 8.7 ms with, 3.3 without (glibc returns blocks of this size to the system).
#pragma once
#include <c10/core/Allocator.h>

#include <cstdint>

namespace nvae {

constexpr int64_t kPooledBytes = 1 << 20;  // smaller tensors come from torch's allocator

// What is in use and what is kept never exceed, together, one and a half times the most that was in use at once: sizes that are
// wanted at different moments of a training step then all stay.
c10::Allocator& pool();

// Gives all that is kept back to the system; returns how many bytes that were.
size_t release_pool();

}  // namespace nvae
