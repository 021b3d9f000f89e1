// Tensors as the caller holds them: a pointer and strides counted in elements.
#pragma once

#include <cstdint>

namespace ca3d {

// (outer, inner, heads, frames, head_dim); the elements of head_dim are contiguous.
struct StridedRows {
  void* data;
  int64_t outer;
  int64_t inner;
  int64_t head;
  int64_t frame;
};

}  // namespace ca3d
