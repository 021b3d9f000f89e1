// Products of matrices whose blocks stay in registers. For sources that are compiled once per
// instruction set.
#pragma once

#include "common/simd.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

// Rows and vectors of columns of a block of results: as many accumulators as registers hold beside
// a row of the right factor.
#if defined(__AVX512F__)
constexpr int kGemmRows = 8, kGemmVectors = 2;
#elif defined(__AVX2__)
constexpr int kGemmRows = 6, kGemmVectors = 2;
#elif defined(__aarch64__)
constexpr int kGemmRows = 4, kGemmVectors = 4;
#else
constexpr int kGemmRows = 4, kGemmVectors = 2;
#endif

// The right factor: `depth` rows, `stride` elements apart, of as many columns as are asked for.
// `next` is what the next product begins with, rows as far apart, or null.
struct GemmRight {
  const float* data;
  int64_t depth;
  int64_t stride;
  const float* next;
};

constexpr int64_t kCacheLine = 64 / sizeof(float);

// Calls finish(row, column, sums) for kVectors vectors of each of kRows rows. With kAhead, a cache
// line of each row at `ahead` is brought into the second cache meanwhile.
template <int kRows, int kVectors, bool kAhead, class RowOf, class Finish>
inline void gemm_block(int64_t row, int64_t column, const RowOf& row_of, const GemmRight& right,
                       const float* ahead, const Finish& finish) {
  const float* left[kRows];
  Vector<float> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    left[r] = row_of(row + r);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector<float>{};
  }
  const float* from = right.data + column;
  for (int64_t k = 0; k < right.depth; ++k, from += right.stride) {
    Vector<float> b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = load(from + v * kLanes<float>);
    if constexpr (kAhead) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += right.stride;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float a = left[r][k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) finish(row + r, column, sum[r]);
}

// `ahead` are the columns that come after these, or null: the first blocks of rows bring one line
// of them each.
template <int kRows, int kVectors, class RowOf, class Finish>
[[gnu::noinline]] void gemm_rows(int64_t rows, int64_t column, const RowOf& row_of,
                                 const GemmRight& right, const float* ahead, const Finish& finish) {
  constexpr int64_t kWidth = kVectors * kLanes<float>;
  int64_t row = 0;
  if (ahead) {
    for (int64_t line = 0; line < kWidth && row + kRows <= rows; line += kCacheLine, row += kRows) {
      gemm_block<kRows, kVectors, true>(row, column, row_of, right, ahead + line, finish);
    }
  }
  for (; row + kRows <= rows; row += kRows) {
    gemm_block<kRows, kVectors, false>(row, column, row_of, right, nullptr, finish);
  }
  for (; kRows > 4 && row + 4 <= rows; row += 4) {
    gemm_block<4, kVectors, false>(row, column, row_of, right, nullptr, finish);
  }
  for (; row + 2 <= rows; row += 2) {
    gemm_block<2, kVectors, false>(row, column, row_of, right, nullptr, finish);
  }
  for (; row < rows; ++row) {
    gemm_block<1, kVectors, false>(row, column, row_of, right, nullptr, finish);
  }
}

template <int kVectors>
struct GemmVectors {
  static constexpr int kCount = kVectors;
};

// left x right, `columns` (a multiple of the lanes) of it. row_of(r) is the address of row r of the
// left factor; finish(row, column, sums, vectors) gets every result once, `vectors.kCount` vectors
// at a time, and each is a sum in the order of the right factor's rows.
template <class RowOf, class Finish>
void gemm(int64_t rows, int64_t columns, const RowOf& row_of, const GemmRight& right,
          const Finish& finish) {
  constexpr int64_t kWide = kGemmVectors * kLanes<float>;
  int64_t column = 0;
  for (; column + kWide <= columns; column += kWide) {
    const float* ahead = column + 2 * kWide <= columns ? right.data + column + kWide : right.next;
    gemm_rows<kGemmRows, kGemmVectors>(rows, column, row_of, right, ahead,
                                       [&](int64_t row, int64_t at, const Vector<float>* sum) {
                                         finish(row, at, sum, GemmVectors<kGemmVectors>{});
                                       });
  }
  for (; column < columns; column += kLanes<float>) {
    gemm_rows<kGemmRows, 1>(rows, column, row_of, right, nullptr,
                            [&](int64_t row, int64_t at, const Vector<float>* sum) {
                              finish(row, at, sum, GemmVectors<1>{});
                            });
  }
}

}  // namespace
}  // namespace CA3D_ISA
}  // namespace ca3d
