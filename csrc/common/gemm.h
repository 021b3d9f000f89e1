// Products of matrices whose blocks stay in registers. For sources that are compiled once per
// instruction set.
#pragma once

#include "common/simd.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

// Rows and vectors of columns of a block of results: as many accumulators as registers hold beside
// a row of the right factor. Blocks that are nearly square load least for what they multiply: with
// 64 columns of depth 64, 6 x 4 ran at 0.94 of the peak and 8 x 2 at 0.91, and beside a neighbour
// on the same core at 0.79 and 0.70 (Intel Sapphire Rapids, one thread, 2026-11-28).
#if defined(__AVX512F__)
constexpr int kGemmRows = 6, kGemmVectors = 4;
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

// Rows of a block of fewer vectors.
template <int kVectors>
constexpr int kGemmRowsOf = kVectors == kGemmVectors ? kGemmRows
                            : kGemmRows > 4          ? 8
                                                     : 4;

// Calls finish(row, column, sums) for kVectors vectors of each of kRows rows. Of each row at
// `ahead` kAhead cache lines are brought into the second cache meanwhile.
template <int kRows, int kVectors, int kAhead, class RowOf, class Finish>
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
    if constexpr (kAhead > 0) {
#pragma GCC unroll 4
      for (int line = 0; line < kAhead; ++line) {
        __builtin_prefetch(ahead + line * kCacheLine, 0, 2);
      }
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

// `ahead` are the columns that come after these, or null: the first two blocks of rows bring half
// of their cache lines each, and the first one brings a single line.
template <int kRows, int kVectors, class RowOf, class Finish>
[[gnu::noinline]] void gemm_rows(int64_t rows, int64_t column, const RowOf& row_of,
                                 const GemmRight& right, const float* ahead, const Finish& finish) {
  constexpr int64_t kWidth = kVectors * kLanes<float>;
  int64_t row = 0;
  if (ahead) {
    constexpr int64_t kLines = (kWidth + kCacheLine - 1) / kCacheLine;
    constexpr int64_t kHalf = (kLines + 1) / 2;
    for (int64_t line = 0; line < kLines && row + kRows <= rows; line += kHalf, row += kRows) {
      gemm_block<kRows, kVectors, kHalf>(row, column, row_of, right, ahead + line * kCacheLine,
                                         finish);
    }
  }
  for (; row + kRows <= rows; row += kRows) {
    gemm_block<kRows, kVectors, 0>(row, column, row_of, right, nullptr, finish);
  }
  for (; kRows > 4 && row + 4 <= rows; row += 4) {
    gemm_block<4, kVectors, 0>(row, column, row_of, right, nullptr, finish);
  }
  for (; row + 2 <= rows; row += 2) {
    gemm_block<2, kVectors, 0>(row, column, row_of, right, nullptr, finish);
  }
  for (; row < rows; ++row) {
    gemm_block<1, kVectors, 0>(row, column, row_of, right, nullptr, finish);
  }
}

template <int kVectors>
struct GemmVectors {
  static constexpr int kCount = kVectors;
};

// Columns from `column` on while kVectors vectors are left of them; returns where it stopped.
template <int kVectors, class RowOf, class Finish>
int64_t gemm_columns(int64_t rows, int64_t column, int64_t columns, const RowOf& row_of,
                     const GemmRight& right, const Finish& finish) {
  constexpr int64_t kWide = kVectors * kLanes<float>;
  for (; column + kWide <= columns; column += kWide) {
    const int64_t next = column + kWide;
    const float* ahead = next == columns           ? right.next
                         : next + kWide <= columns ? right.data + next
                                                   : nullptr;
    gemm_rows<kGemmRowsOf<kVectors>, kVectors>(
        rows, column, row_of, right, ahead, [&](int64_t row, int64_t at, const Vector<float>* sum) {
          finish(row, at, sum, GemmVectors<kVectors>{});
        });
  }
  return column;
}

// Whether `columns` are computed at once: then results may take the place of the left factor.
constexpr bool gemm_at_once(int64_t columns) {
  const int64_t vectors = columns / kLanes<float>;
  return vectors == kGemmVectors || vectors == 1 || (vectors == 2 && kGemmVectors > 2);
}

// left x right, `columns` (a multiple of the lanes) of it. row_of(r) is the address of row r of the
// left factor; finish(row, column, sums, vectors) gets every result once, `vectors.kCount` vectors
// at a time, and each is a sum in the order of the right factor's rows.
template <class RowOf, class Finish>
void gemm(int64_t rows, int64_t columns, const RowOf& row_of, const GemmRight& right,
          const Finish& finish) {
  int64_t column = gemm_columns<kGemmVectors>(rows, 0, columns, row_of, right, finish);
  if constexpr (kGemmVectors > 2) {
    column = gemm_columns<2>(rows, column, columns, row_of, right, finish);
  }
  gemm_columns<1>(rows, column, columns, row_of, right, finish);
}

}  // namespace
}  // namespace CA3D_ISA
}  // namespace ca3d
