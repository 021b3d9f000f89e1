// Scratch memory of a kernel, cut into pieces. For sources that are compiled once per instruction
// set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ca3d {
namespace CA3D_ISA {
namespace {

// Hands out pieces of whole cache lines.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class Element>
  Element* take(int64_t count) {
    char* piece = memory_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(Element) + 63) / 64 * 64;
    return reinterpret_cast<Element*>(piece);
  }
  std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_ = 0;
};

}  // namespace
}  // namespace CA3D_ISA
}  // namespace ca3d
