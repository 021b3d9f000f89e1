// Memory in whole cache lines, for the scratch of kernels.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace ca3d {

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
using AlignedMemory = std::unique_ptr<char, FreeAligned>;

// `bytes` must be a multiple of 64, and so is the address. Throws std::bad_alloc.
inline AlignedMemory allocate_aligned(std::size_t bytes) {
  void* memory = std::aligned_alloc(64, bytes);
  if (!memory) throw std::bad_alloc();
  return AlignedMemory(static_cast<char*>(memory));
}

}  // namespace ca3d
