// Sizes and names of element types.
#pragma once

#include "common/dtype.h"

namespace ca3d {

constexpr int stored_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat64   ? "float64"
         : dtype == DType::kFloat32 ? "float32"
         : dtype == DType::kFloat16 ? "float16"
                                    : "bfloat16";
}

}  // namespace ca3d
