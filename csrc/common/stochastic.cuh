// Stochastic rounding of one value to 16 bits.
#pragma once

#include "common/cuda.h"
#include "common/dtype.h"

namespace ca3d {

// Stores one of the two neighbours of x, the upper one (in magnitude) with a probability
// proportional to the distance, given 16 random bits: as many of them as the storage drops are
// added below the last bit that is kept. 0xffff rounds away from zero.
//
// Beyond the largest finite number, where there is no upper neighbour, x is rounded to nearest.

__device__ __forceinline__ void narrow_stochastically(float x, uint32_t random, Half* to) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) {  // 65520
    *to = to_half(x);
    return;
  }
  uint32_t kept = magnitude;
  if (magnitude < uint32_t{113} << 23) {
    // Adding 2^-14 puts the last bit of a subnormal result where that of a normal one is.
    kept = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0x1p-14f)) - (uint32_t{1} << 23);
  }
  const uint32_t rounded = ((kept + (random >> 3)) >> 13) - (uint32_t{112} << 10);
  to->bits = static_cast<uint16_t>((rounded < 0x7bff ? rounded : 0x7bff) | (bits >> 16 & 0x8000));
}

__device__ __forceinline__ void narrow_stochastically(float x, uint32_t random, BFloat16* to) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x7f7f8000) {  // half an ulp beyond the largest number
    *to = to_bfloat16(x);
    return;
  }
  const uint32_t rounded = (magnitude + random) >> 16;
  to->bits = static_cast<uint16_t>((rounded < 0x7f7f ? rounded : 0x7f7f) | (bits >> 16 & 0x8000));
}

}  // namespace ca3d
