// Elements of any stored type, read and written one by one or 16 bytes at a time.
#pragma once

#include <type_traits>

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

// What is accessed at once: 16 bytes, or 8 of the narrower of two types that are moved together.
template <class Stored, int kCount>
struct WholeAccess {
  static_assert(kCount * sizeof(Stored) == 16 || kCount * sizeof(Stored) == 8, "a whole access");
  using Type = std::conditional_t<kCount * sizeof(Stored) == 16, uint4, uint2>;
};
// Of uint4 some compilers make three accesses of two doubles.
template <>
struct WholeAccess<double, 2> {
  using Type = double2;
};

// Elements of one access, as they lie in memory and in registers.
template <class Stored, int kCount>
union Vector {
  typename WholeAccess<Stored, kCount>::Type bytes;
  Stored element[kCount];
};

// Elements of the widest access that moves kWidth of them.
template <class Stored, int kWidth>
constexpr int kAccessWidth = kWidth < kVectorWidth<Stored> ? kWidth : kVectorWidth<Stored>;

// Copies kWidth elements from or to memory: one, or whole accesses at an address that is a multiple
// of their size.
template <int kWidth, class Stored>
__device__ __forceinline__ void read(const Stored* from, Stored* to) {
  if constexpr (kWidth == 1) {
    *to = *from;
  } else {
    constexpr int kCount = kAccessWidth<Stored, kWidth>;
    static_assert(kWidth % kCount == 0, "whole accesses");
#pragma unroll
    for (int i = 0; i < kWidth; i += kCount) {
      Vector<Stored, kCount> vector;
      vector.bytes = *reinterpret_cast<const decltype(vector.bytes)*>(from + i);
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
    constexpr int kCount = kAccessWidth<Stored, kWidth>;
    static_assert(kWidth % kCount == 0, "whole accesses");
#pragma unroll
    for (int i = 0; i < kWidth; i += kCount) {
      Vector<Stored, kCount> vector;
#pragma unroll
      for (int j = 0; j < kCount; ++j) vector.element[j] = from[i + j];
      *reinterpret_cast<decltype(vector.bytes)*>(to + i) = vector.bytes;
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
