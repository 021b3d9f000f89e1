// Stochastic rounding of vectors to 16 bits. Only for sources that are compiled once per
// instruction set.
#pragma once

#include <cstdint>

#include "common/simd.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

// Stores one of the two neighbours of x, the upper one (in magnitude) with a probability
// proportional to the distance, given 16 random bits in each lane: as many of them as the storage
// drops are added below the last bit that is kept. All bits set round away from zero.
//
// Beyond the largest finite number, where there is no upper neighbour, x is rounded to nearest.

#if defined(__F16C__)
constexpr int kTruncate = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
// Twice the bits of a result that plain truncation gets right: above the smallest normal number and
// below the largest one.
constexpr int16_t kPlainFrom = 2 * 0x401;
constexpr int16_t kPlainSpan = static_cast<int16_t>(2 * (0x7bfe - 0x401));
#endif

// A subnormal result of float16 has its last bit where that of a normal one is while 2^-14 is
// added.

#if defined(__AVX512F__)

// Of any numbers.
inline __m256i rounded_stochastically(Vector<float> x, Bits<float> random) {
  const Bits<float> bits = bit_cast<Bits<float>>(x);
  const __m512 magnitude = bit_cast<__m512>(bits & 0x7fffffff);
  const __m512 lift = bit_cast<__m512>((bits & 0x80000000) | (uint32_t{113} << 23));
  const __mmask16 subnormal = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-14f), _CMP_LT_OQ);
  const __mmask16 beyond = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(65520), _CMP_NLT_UQ);
  const __m512 lifted = _mm512_mask_add_ps(x, subnormal, x, lift);
  const __m512 sum = bit_cast<__m512>(bit_cast<Bits<float>>(lifted) + (random >> 3));
  // Truncation makes 65504 of all that is finite, so what is to be infinite must be so before.
  const __m512 finite = _mm512_mask_mul_ps(sum, beyond, x, _mm512_set1_ps(0x1p113f));
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, finite, kTruncate);
  return _mm256_mask_sub_epi16(half, subnormal, half, _mm256_set1_epi16(0x400));
}

inline void store_stochastically(Half* to, Vector<float> x, Bits<float> random) {
  const __m512 sum = bit_cast<__m512>(bit_cast<Bits<float>>(x) + (random >> 3));
  __m256i half = _mm512_maskz_cvtps_ph(0xffff, sum, kTruncate);
  const __m256i magnitude = _mm256_add_epi16(half, half);
  const __m256i above = _mm256_sub_epi16(magnitude, _mm256_set1_epi16(kPlainFrom));
  const __mmask16 special = _mm256_cmpgt_epu16_mask(above, _mm256_set1_epi16(kPlainSpan));
  if (__builtin_expect(special != 0, 0)) half = rounded_stochastically(x, random);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}

#elif defined(__F16C__)

// Of any numbers.
inline __m128i rounded_stochastically(Vector<float> x, Bits<float> random) {
  const Bits<float> bits = bit_cast<Bits<float>>(x);
  const Vector<float> magnitude = bit_cast<Vector<float>>(bits & 0x7fffffff);
  const Bits<float> subnormal = bit_cast<Bits<float>>(magnitude < 0x1p-14f);
  const Vector<float> lift =
      bit_cast<Vector<float>>(((bits & 0x80000000) | (uint32_t{113} << 23)) & subnormal);
  const Bits<float> sum = bit_cast<Bits<float>>(x + lift) + (random >> 3);
  Vector<float> rounded = bit_cast<Vector<float>>(sum & 0xffffe000) - lift;
  rounded = bit_cast<Vector<float>>(bit_cast<Bits<float>>(rounded) | (bits & 0x80000000));
  // Truncation makes 65504 of all that is finite, so what is to be infinite must be so before.
  const Vector<float> finite = magnitude < 65520 ? rounded : x * 0x1p113f;
  return _mm256_cvtps_ph(finite, kTruncate);
}

inline void store_stochastically(Half* to, Vector<float> x, Bits<float> random) {
  const Bits<float> sum = bit_cast<Bits<float>>(x) + (random >> 3);
  __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(sum), kTruncate);
  const __m128i magnitude = _mm_add_epi16(half, half);
  const __m128i above = _mm_sub_epi16(magnitude, _mm_set1_epi16(kPlainFrom));
  const __m128i most = _mm_min_epu16(above, _mm_set1_epi16(kPlainSpan));
  const bool plain = _mm_movemask_epi8(_mm_cmpeq_epi16(above, most)) == 0xffff;
  if (__builtin_expect(!plain, 0)) half = rounded_stochastically(x, random);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}

#else

inline void store_stochastically(Half* to, Vector<float> x, Bits<float> random) {
  const Bits<float> bits = bit_cast<Bits<float>>(x);
  const Bits<float> sign = (bits >> 16) & 0x8000;
  const Bits<float> magnitude = bits & 0x7fffffff;
  const Bits<float> lifted =
      bit_cast<Bits<float>>(bit_cast<Vector<float>>(magnitude) + 0x1p-14f) - (uint32_t{1} << 23);
  const Bits<float> kept = magnitude < (uint32_t{113} << 23) ? lifted : magnitude;
  const Bits<float> rounded = ((kept + (random >> 3)) >> 13) - (uint32_t{112} << 10);
  const Bits<float> largest = 0x7bff - Bits<float>{}, infinity = 0x7c00 - Bits<float>{};
  const Bits<float> nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  Bits<float> half = rounded < largest ? rounded : largest;
  half = magnitude >= 0x477ff000 ? infinity : half;  // 65520 and above
  half = magnitude > 0x7f800000 ? nan : half;
  const HalfBits narrow = __builtin_convertvector(half | sign, HalfBits);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

#endif

inline void store_stochastically(BFloat16* to, Vector<float> x, Bits<float> random) {
  const Bits<float> bits = bit_cast<Bits<float>>(x);
  const Bits<float> sign = (bits >> 16) & 0x8000;
  const Bits<float> magnitude = bits & 0x7fffffff;
  const Bits<float> rounded = (magnitude + random) >> 16;
  const Bits<float> largest = 0x7f7f - Bits<float>{}, infinity = 0x7f80 - Bits<float>{};
  Bits<float> half = rounded < largest ? rounded : largest;
  half = magnitude >= 0x7f7f8000 ? infinity : half;
  half = magnitude > 0x7f800000 ? (magnitude >> 16) | 0x40 : half;
  const HalfBits narrow = __builtin_convertvector(half | sign, HalfBits);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

}  // namespace
}  // namespace CA3D_ISA
}  // namespace ca3d
