// One vector type for every instruction set, built on the compilers' vector extensions: +, -, *, /,
// comparisons and ?: act on each lane; a * b + c becomes a fused multiply-add where there is one.
//
// Only for sources that are compiled once per instruction set. Everything has internal linkage: of
// an inline function with external linkage the linker would keep one copy for all of them, say the
// AVX-512 one, and a machine without AVX-512 would crash in it.
#pragma once

#ifndef CA3D_ISA
#error "simd.h belongs to sources that are compiled once per instruction set"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>

#include "common/dtype.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Scalar>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VectorTypes<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};

// A vector of Scalars, and the unsigned integers of the same width.
template <class Scalar>
using Vector = typename VectorTypes<Scalar>::Vector;
template <class Scalar>
using Bits = typename VectorTypes<Scalar>::Bits;

template <class Scalar>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Scalar));

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class Scalar>
inline Vector<Scalar> broadcast(Scalar x) {
  return x - Vector<Scalar>{};
}

template <class Scalar>
inline Vector<Scalar> max(Vector<Scalar> a, Vector<Scalar> b) {
  return a > b ? a : b;
}

// ---- memory: unaligned, converting to and from the type that is computed in ----

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

inline Vector<float> load(const float* from) {
  Vector<float> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline Vector<double> load(const double* from) {
  Vector<double> x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

inline void store(float* to, Vector<float> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

inline void store(double* to, Vector<double> x) {
  __builtin_memcpy(to, &x, sizeof x);
}

inline Vector<float> load(const BFloat16* from) {
  HalfBits half;
  __builtin_memcpy(&half, from, sizeof half);
  return bit_cast<Vector<float>>(__builtin_convertvector(half, Bits<float>) << 16);
}

// Rounds to nearest, ties to even; a NaN stays a (quiet) NaN.
inline void store(BFloat16* to, Vector<float> x) {
  const Bits<float> bits = bit_cast<Bits<float>>(x);
  const Bits<float> rounded = bits + ((bits >> 16 & 1) + 0x7fff);
  const Bits<float> chosen = x == x ? rounded : bits | 0x400000;
  const HalfBits half = __builtin_convertvector(chosen >> 16, HalfBits);
  __builtin_memcpy(to, &half, sizeof half);
}

#if defined(__AVX512F__)

// The masked forms (of a full mask), because gcc 12 warns of its own headers in the plain ones.
inline Vector<float> load(const Half* from) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline void store(Half* to, Vector<float> x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(0xffff, x, kNearest));
}

#elif defined(__F16C__)

inline Vector<float> load(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

inline void store(Half* to, Vector<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__aarch64__)

inline Vector<float> load(const Half* from) {
  float16x4_t half;
  __builtin_memcpy(&half, from, sizeof half);
  return bit_cast<Vector<float>>(vcvt_f32_f16(half));
}

inline void store(Half* to, Vector<float> x) {
  const float16x4_t half = vcvt_f16_f32(bit_cast<float32x4_t>(x));
  __builtin_memcpy(to, &half, sizeof half);
}

#else

// binary16 by integer arithmetic. A normal number only needs its exponent moved by 127 - 15; a
// subnormal one is put behind the exponent of 2^-14, which is then subtracted; above lie inf and
// NaN.
inline Vector<float> load(const Half* from) {
  HalfBits half;
  __builtin_memcpy(&half, from, sizeof half);
  const Bits<float> wide = __builtin_convertvector(half, Bits<float>);
  const Bits<float> sign = (wide & 0x8000) << 16;
  const Bits<float> magnitude = (wide & 0x7fff) << 13;
  const Bits<float> offset = (uint32_t{113} << 23) - Bits<float>{};
  const Bits<float> normal = magnitude + (uint32_t{112} << 23);
  const Bits<float> subnormal = bit_cast<Bits<float>>(bit_cast<Vector<float>>(magnitude + offset) -
                                                      bit_cast<Vector<float>>(offset));
  const Bits<float> special = magnitude | 0x7f800000;
  const Bits<float> finite = magnitude < (uint32_t{1} << 23) ? subnormal : normal;
  return bit_cast<Vector<float>>((magnitude >= (uint32_t{31} << 23) ? special : finite) | sign);
}

// Rounds to nearest, ties to even. Adding 0.5 makes the processor round a subnormal result at the
// right bit; a normal one is rounded by carrying into the bits that are kept.
inline void store(Half* to, Vector<float> x) {
  const Bits<float> bits = bit_cast<Bits<float>>(x);
  const Bits<float> sign = (bits >> 16) & 0x8000;
  const Bits<float> magnitude = bits & 0x7fffffff;
  const Bits<float> normal =
      (magnitude - (uint32_t{112} << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Vector<float> lifted = bit_cast<Vector<float>>(magnitude) + 0.5f;
  const Bits<float> subnormal = bit_cast<Bits<float>>(lifted) - (uint32_t{126} << 23);
  const Bits<float> infinity = 0x7c00 - Bits<float>{};
  const Bits<float> nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  Bits<float> half = magnitude < (uint32_t{113} << 23) ? subnormal : normal;
  half = magnitude >= (uint32_t{143} << 23) ? infinity : half;  // 2^16 and above
  half = magnitude > 0x7f800000 ? nan : half;
  const HalfBits narrow = __builtin_convertvector(half | sign, HalfBits);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

#endif

// ---- across lanes ----

template <int... I>
struct Indices {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  using Type = Indices<I...>;
};

template <int Distance, class Scalar, int... I>
inline Vector<Scalar> pair_sums(Vector<Scalar> a, Vector<Scalar> b, Indices<I...>) {
  constexpr int kCount = kLanes<Scalar>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I & Distance ? kCount + I : I)...) +
         __builtin_shufflevector(a, b, ((I & Distance ? kCount : 0) + (I ^ Distance))...);
#else
  constexpr Bits<Scalar> kOwn = {(I & Distance ? kCount + I : I)...};
  constexpr Bits<Scalar> kOther = {((I & Distance ? kCount : 0) + (I ^ Distance))...};
  return __builtin_shuffle(a, b, kOwn) + __builtin_shuffle(a, b, kOther);
#endif
}

// Lane i holds x[i] + x[i ^ Distance], of x = b where i has the bit Distance, else of x = a.
//
// With Distance = 1, 2, 4, ... in turn this is the tree that adds up W vectors of W lanes: vectors
// 2m and 2m+1 give one, then neighbours of these, ...; in the end lane i holds the sum of vector i.
template <int Distance, class Scalar>
inline Vector<Scalar> pair_sums(Vector<Scalar> a, Vector<Scalar> b) {
  return pair_sums<Distance, Scalar>(a, b, typename CountTo<kLanes<Scalar>>::Type{});
}

// ---- functions ----

template <class Scalar>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kDegree = 7, kMantissaBits = 23, kBias = 127;
  static constexpr float kShift = 0x1.8p23f;      // adding it rounds to an integer
  static constexpr float kSmallest = -87.33654f;  // ln 2^-126
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;
};

template <>
struct ExpConstants<double> {
  static constexpr int kDegree = 13, kMantissaBits = 52, kBias = 1023;
  static constexpr double kShift = 0x1.8p52;
  static constexpr double kSmallest = -708.3964185322641;  // ln 2^-1022
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
};

struct InverseFactorials {
  double of[14] = {};
  constexpr InverseFactorials() {
    of[0] = 1;
    for (int i = 1; i < 14; ++i) of[i] = of[i - 1] / i;
  }
};

// exp(x) for x <= 0 (or NaN): 2^n exp(f) with x = n ln 2 + f, |f| <= ln(2) / 2, and exp(f) from its
// Taylor series. What would be subnormal becomes 0.
template <class Scalar>
inline Vector<Scalar> exp_of_nonpositive(Vector<Scalar> x) {
  using Constants = ExpConstants<Scalar>;
  const Vector<Scalar> shifted = x * Scalar(1.4426950408889634) + Constants::kShift;
  const Vector<Scalar> n = shifted - Constants::kShift;
  const Vector<Scalar> f = (x - n * Constants::kLn2High) - n * Constants::kLn2Low;
  constexpr InverseFactorials kCoefficients;
  Vector<Scalar> series = broadcast(Scalar(kCoefficients.of[Constants::kDegree]));
#pragma GCC unroll 16
  for (int i = Constants::kDegree - 1; i >= 0; --i)
    series = series * f + Scalar(kCoefficients.of[i]);
  // The low bits of `shifted` are n in two's complement: they go to the place of the exponent.
  const Bits<Scalar> exponent = (bit_cast<Bits<Scalar>>(shifted) + Constants::kBias)
                                << Constants::kMantissaBits;
  const Vector<Scalar> result = series * bit_cast<Vector<Scalar>>(exponent);
  return x < Constants::kSmallest ? Vector<Scalar>{} : result;
}

}  // namespace
}  // namespace CA3D_ISA
}  // namespace ca3d
