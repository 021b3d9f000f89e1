// Division by a number that is known at the launch: a product and a shift instead of some 20
// instructions.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ca3d {

// Quotients of 0 .. 2^31 - 1. With shift = ceil(log2 divisor) and multiplier =
// floor(2^32 (2^shift - divisor) / divisor) + 1, the quotient of n is
// floor((n + floor(n multiplier / 2^32)) / 2^shift) for every n below 2^32 (Granlund and
// Montgomery, "Division by invariant integers using multiplication", 1994); n below 2^31 keeps the
// sum in 32 bits.
struct Divider {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;
};

// `divisor` is 1 .. 2^31 - 1.
inline Divider make_divider(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t power = uint64_t{1} << shift, d = static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(((power - d) << 32) / d + 1), shift};
}

CA3D_HOST_DEVICE inline uint32_t operator/(uint32_t n, Divider by) {
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * by.multiplier >> 32);
  return (n + high) >> by.shift;
}

CA3D_HOST_DEVICE inline uint32_t operator%(uint32_t n, Divider by) {
  return n - n / by * by.divisor;
}

}  // namespace ca3d
