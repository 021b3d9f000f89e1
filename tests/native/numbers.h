// Numbers as the kernels store them, read and written by plain arithmetic, and random ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

struct Format {
  const char* name;
  ca3d::DType dtype;
  std::size_t bytes;
  int digits;        // binary digits of the significand
  int min_exponent;  // of the smallest normal number 2^min_exponent
  double computed_epsilon;
};

inline const Format kFloat32 = {"float32", ca3d::DType::kFloat32, 4, 24, -126, 0x1p-23};
inline const Format kFloat64 = {"float64", ca3d::DType::kFloat64, 8, 53, -1022, 0x1p-52};
inline const Format kFloat16 = {"float16", ca3d::DType::kFloat16, 2, 11, -14, 0x1p-23};
inline const Format kBFloat16 = {"bfloat16", ca3d::DType::kBFloat16, 2, 8, -126, 0x1p-23};

// Sign, exponent and significand of 16 bits, by arithmetic.
inline double decode16(uint16_t bits, const Format& format) {
  const int fraction_bits = format.digits - 1, exponent_bits = 15 - fraction_bits;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  double magnitude;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction ? std::nan("") : HUGE_VAL;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, format.min_exponent - fraction_bits);
  } else {
    magnitude = std::ldexp(fraction + (1 << fraction_bits),
                           exponent - 1 + format.min_exponent - fraction_bits);
  }
  return bits >> 15 ? -magnitude : magnitude;
}

// The nearest number of the format, ties to even.
inline uint16_t encode16(double x, const Format& format) {
  if (std::isnan(x)) return 0x7fff;
  const int fraction_bits = format.digits - 1, exponent_bits = 15 - fraction_bits;
  const int infinity = ((1 << exponent_bits) - 1) << fraction_bits;
  int bits = infinity;
  if (std::fabs(x) < std::ldexp(1.0, 2 - format.min_exponent)) {
    const int exponent = std::max(std::ilogb(x), format.min_exponent);  // ilogb(0) is least
    const int significand =
        static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), fraction_bits - exponent)));
    // A significand without its leading digit is subnormal; one that overflows carries, at the
    // largest exponent into infinity.
    bits = ((exponent - format.min_exponent) << fraction_bits) + significand;
  }
  return static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0));
}

inline double read(const char* at, const Format& format) {
  float single;
  double wide;
  uint16_t half;
  switch (format.bytes) {
    case 4:
      std::memcpy(&single, at, 4);
      return single;
    case 8:
      std::memcpy(&wide, at, 8);
      return wide;
    default:
      std::memcpy(&half, at, 2);
      return decode16(half, format);
  }
}

inline void write(char* at, double x, const Format& format) {
  const float single = static_cast<float>(x);
  if (format.bytes == 8) {
    std::memcpy(at, &x, 8);
  } else if (format.bytes == 4) {
    std::memcpy(at, &single, 4);
  } else {
    const uint16_t half = encode16(x, format);
    std::memcpy(at, &half, 2);
  }
}

inline uint64_t random_state = 1;

inline uint64_t random_bits() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline int64_t random_below(int64_t bound) {
  return static_cast<int64_t>(random_bits() % bound);
}

// Between -1 and 1.
inline double random_number() {
  return std::ldexp(static_cast<double>(random_bits() >> 11), -52) - 1;
}
