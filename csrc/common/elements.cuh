// Elements of any stored type, read and written one by one or 16 bytes at a time.
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"

namespace ca3d {

// The type that a stored type is computed in.
template <class Stored>
struct ComputedAs {
  using Type = float;
};
template <>
struct ComputedAs<double> {
  using Type = double;
};
template <class Stored>
using Computed = typename ComputedAs<Stored>::Type;

constexpr int kVectorBytes = 16;

// Elements of a 16-byte access.
template <class Stored>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(Stored));

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}

__device__ __forceinline__ void narrow(float x, Half* to) {
  *to = to_half(x);
}
__device__ __forceinline__ void narrow(float x, BFloat16* to) {
  *to = to_bfloat16(x);
}
__device__ __forceinline__ void narrow(float x, float* to) {
  *to = x;
}
__device__ __forceinline__ void narrow(double x, double* to) {
  *to = x;
}

// 16 bytes of elements, as they lie in memory and in registers.
template <class Stored>
union Vector {
  uint4 bytes;
  Stored element[kVectorWidth<Stored>];
};

// Copies kWidth elements from or to memory: one, or whole vectors at an address that is a multiple
// of 16.
template <int kWidth, class Stored>
__device__ __forceinline__ void read(const Stored* from, Stored* to) {
  if constexpr (kWidth == 1) {
    *to = *from;
  } else {
    constexpr int kCount = kVectorWidth<Stored>;
    static_assert(kWidth % kCount == 0, "whole vectors");
#pragma unroll
    for (int i = 0; i < kWidth; i += kCount) {
      Vector<Stored> vector;
      vector.bytes = *reinterpret_cast<const uint4*>(from + i);
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[i + j] = vector.element[j];
    }
  }
}

template <int kWidth, class Stored>
__device__ __forceinline__ void write(Stored* to, const Stored* from) {
  if constexpr (kWidth == 1) {
    *to = *from;
  } else {
    constexpr int kCount = kVectorWidth<Stored>;
    static_assert(kWidth % kCount == 0, "whole vectors");
#pragma unroll
    for (int i = 0; i < kWidth; i += kCount) {
      Vector<Stored> vector;
#pragma unroll
      for (int j = 0; j < kCount; ++j) vector.element[j] = from[i + j];
      *reinterpret_cast<uint4*>(to + i) = vector.bytes;
    }
  }
}

// The same, converted to the type that is computed in.
template <int kWidth, class Stored>
__device__ __forceinline__ void load(const Stored* from, Computed<Stored>* to) {
  Stored stored[kWidth];
  read<kWidth>(from, stored);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] = widen(stored[i]);
}

// And back, each element rounded to nearest.
template <int kWidth, class Stored>
__device__ __forceinline__ void store(Stored* to, const Computed<Stored>* from) {
  Stored stored[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) narrow(from[i], &stored[i]);
  write<kWidth>(to, stored);
}

}  // namespace ca3d
