// Constants of Philox4x32-10, the counter-based random numbers of J. K. Salmon et al., SC 2011.
//
// With s the seed, t the step, n the tensor and e the place of an element in it, the element has a
// share in word e mod 4 of
//   Philox4x32-10(key (s mod 2^32, s div 2^32), counter (b mod 2^32, b div 2^32, n, t)),
//   b = 4 (e div 32) + (e mod 16) div 4:
// the elements i and i + 16 of 32 share a word. Each takes 16 bits for theta, the first one the low
// ones and the second the high ones, and for the momentum the half that the other takes for theta.
// So the two numbers of an element are independent of each other, and theta's of those of all other
// elements.
#pragma once

#include <cstdint>

namespace ca3d {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xd2511f53, kPhiloxMultiplier1 = 0xcd9e8d57;
// What the key grows by from round to round.
constexpr uint32_t kPhiloxWeyl0 = 0x9e3779b9, kPhiloxWeyl1 = 0xbb67ae85;

}  // namespace ca3d
