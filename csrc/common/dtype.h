// Element types that the kernels read and write.
#pragma once

#include <cstdint>

namespace ca3d {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

// IEEE binary16 and bfloat16 as they lie in memory. Arithmetic happens in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace ca3d
