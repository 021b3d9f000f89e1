// The numbers of philox.h for vectors of elements. Only for sources that are compiled once per
// instruction set.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/simd.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

// The key of each round, the same in all lanes.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      first[round] = uint64_t{low} - Bits<double>{};
      second[round] = uint64_t{high} - Bits<double>{};
      low += kPhiloxWeyl0;
      high += kPhiloxWeyl1;
    }
  }

  Bits<double> first[kPhiloxRounds], second[kPhiloxRounds];
};

// Products of the low halves of 64-bit lanes with a word.
inline Bits<double> times_low(Bits<double> x, uint32_t word) {
#if defined(__AVX512F__)
  return bit_cast<Bits<double>>(
      _mm512_maskz_mul_epu32(0xff, bit_cast<__m512i>(x), _mm512_set1_epi64(word)));
#elif defined(__AVX2__)
  return bit_cast<Bits<double>>(_mm256_mul_epu32(bit_cast<__m256i>(x), _mm256_set1_epi64x(word)));
#elif defined(__SSE2__)
  return bit_cast<Bits<double>>(_mm_mul_epu32(bit_cast<__m128i>(x), _mm_set1_epi64x(word)));
#elif defined(__aarch64__)
  return bit_cast<Bits<double>>(vmull_n_u32(vmovn_u64(bit_cast<uint64x2_t>(x)), word));
#else
  return (x & 0xffffffff) * word;
#endif
}

template <int kOffset, int... I>
inline Bits<double> interleaved(Bits<double> a, Bits<double> b, Indices<I...>) {
  constexpr int kCount = kLanes<double>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I % 2 ? kCount + I - 1 + kOffset : I + kOffset)...);
#else
  constexpr Bits<double> kFrom = {
      static_cast<uint64_t>(I % 2 ? kCount + I - 1 + kOffset : I + kOffset)...};
  return __builtin_shuffle(a, b, kFrom);
#endif
}

// Words of Philox, in order.
struct PhiloxPair {
  Bits<float> of[2];
};

// Those of the counters block .. block + kLanes<double> - 1.
//
// Words lie in the low halves of 64-bit lanes, because that is where multiplications take them
// from; what is left in the high halves does no harm. Lane 2 q + h holds the counter
// block + q + h * kLanes<double> / 2: the last step then leaves the words of q = 0, 1, ... in
// order.
inline PhiloxPair philox(const PhiloxKeys& keys, uint64_t block, uint32_t tensor, uint32_t step) {
  constexpr int kCount = kLanes<double>;
  Bits<double> counter;
  for (int lane = 0; lane < kCount; ++lane) {
    counter[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * (kCount / 2));
  }
  counter += block;
  Bits<double> x0 = counter, x1 = counter >> 32;
  Bits<double> x2 = uint64_t{tensor} - Bits<double>{}, x3 = uint64_t{step} - Bits<double>{};
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Bits<double> a = times_low(x0, kPhiloxMultiplier0);
    const Bits<double> b = times_low(x2, kPhiloxMultiplier1);
    x0 = (b >> 32) ^ x1 ^ keys.first[round];
    x1 = b;
    x2 = (a >> 32) ^ x3 ^ keys.second[round];
    x3 = a;
  }
  const Bits<double> first = (x0 & 0xffffffff) | (x1 << 32);
  const Bits<double> second = (x2 & 0xffffffff) | (x3 << 32);
  using Lanes = typename CountTo<kCount>::Type;
  return {{bit_cast<Bits<float>>(interleaved<0>(first, second, Lanes{})),
           bit_cast<Bits<float>>(interleaved<1>(first, second, Lanes{}))}};
}

// Two numbers of 16 bits for each of kVectors vectors of elements: whole groups of 32.
struct Drawn {
  static constexpr int kVectors = kLanes<float> > 4 ? 4 : 8;

  Bits<float> pre_param[kVectors], momentum[kVectors];
};

// Those of the elements from `first`, a multiple of 32, on.
inline Drawn draw(const PhiloxKeys& keys, int64_t first, uint32_t tensor, uint32_t step) {
  constexpr int kWords = kLanes<float>, kHalfGroup = 16 / kWords;  // in vectors
  Drawn drawn;
  for (int pair = 0; pair < Drawn::kVectors / 4; ++pair) {
    const uint64_t block = static_cast<uint64_t>(first) / 8 + pair * kLanes<double>;
    const PhiloxPair words = philox(keys, block, tensor, step);
    for (int i = 0; i < 2; ++i) {
      const int word = 2 * pair + i;  // in vectors
      const int element = word / kHalfGroup * 2 * kHalfGroup + word % kHalfGroup;
      const Bits<float> low = words.of[i] & 0xffff, high = words.of[i] >> 16;
      drawn.pre_param[element] = drawn.momentum[element + kHalfGroup] = low;
      drawn.momentum[element] = drawn.pre_param[element + kHalfGroup] = high;
    }
  }
  return drawn;
}

}  // namespace
}  // namespace CA3D_ISA
}  // namespace ca3d
