// Philox4x32-10 for one thread; see philox.h.
#pragma once

#include "common/cuda.h"
#include "common/philox.h"

namespace ca3d {

struct PhiloxWords {
  uint32_t of[4];
};

__device__ __forceinline__ PhiloxWords philox(uint64_t seed, uint64_t block, uint32_t tensor,
                                              uint32_t step) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t x0 = static_cast<uint32_t>(block), x1 = static_cast<uint32_t>(block >> 32);
  uint32_t x2 = tensor, x3 = step;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(x0) * kPhiloxMultiplier0;
    const uint64_t b = static_cast<uint64_t>(x2) * kPhiloxMultiplier1;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(a);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return {{x0, x1, x2, x3}};
}

// 16 random bits for theta, the low ones, and 16 for its momentum for each of kWidth elements of a
// tensor from `first` on: one, or eight from a multiple of eight.
template <int kWidth>
__device__ __forceinline__ void draw(uint64_t seed, int64_t first, uint32_t tensor, uint32_t step,
                                     uint32_t* to) {
  static_assert(kWidth == 1 || kWidth == 8, "an element, or a vector of 16 bytes");
  const uint64_t place = static_cast<uint64_t>(first);
  const uint64_t block = place / 32 * 4 + place % 16 / 4;
#pragma unroll
  for (int i = 0; i < kWidth; i += 4) {
    const PhiloxWords words = philox(seed, block + static_cast<uint64_t>(i / 4), tensor, step);
#pragma unroll
    for (int j = 0; j < 4 && i + j < kWidth; ++j) {
      uint32_t word = words.of[j];
      if (kWidth == 1) {
        // By selection: an index would put the words into memory.
        const uint32_t first_two = place % 2 ? words.of[1] : words.of[0];
        const uint32_t last_two = place % 2 ? words.of[3] : words.of[2];
        word = place % 4 < 2 ? first_two : last_two;
      }
      to[i + j] = place & 16 ? word << 16 | word >> 16 : word;
    }
  }
}

}  // namespace ca3d
