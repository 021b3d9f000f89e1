// Batch normalisation of a rectified tensor, seen as a matrix of rows (pixels) and channels: the
// memory passes around a convolution that keep nothing but its output y. With x = relu(y):
//   statistics  mean and variance of x, channel by channel
//   apply       z = (x - mean) * scale + bias (+ residual)
//   reduce      sum of dz, and of dz * (x - mean), channel by channel
//   backward    dy = scale * (dz - offset - (x - mean) * slope) where y > 0, else 0
// Computed in float (double for double tensors); sums over many rows are put together in double,
// in an order that depends on the size of the matrix alone.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ca3d {

struct NormReluProblem {
  DType dtype;  // of y, z, dz, dy and residual
  int64_t rows;
  int64_t channels;
  bool relu;  // false: x = y, and dy is not masked
};

// One number a channel.
struct NormReluCoefficients {
  const double* mean;
  const double* scale;
  const double* bias;    // of apply
  const double* offset;  // of backward
  const double* slope;   // of backward
};

// All matrices are dense, row by row. Each function throws std::invalid_argument for a bad problem.

// Mean and biased variance of x, `channels` numbers each.
void norm_relu_statistics(const NormReluProblem& problem, const void* y, double* mean,
                          double* variance, int threads);

// Writes z, which may be the residual's memory; residual may be null.
void norm_relu_apply(const NormReluProblem& problem, const NormReluCoefficients& coefficients,
                     const void* y, const void* residual, void* z, int threads);

// Sums of dz and of dz * (x - mean), `channels` numbers each. `more`, unless null, is added to dz
// first, in place.
void norm_relu_reduce(const NormReluProblem& problem, const double* mean, const void* y, void* dz,
                      const void* more, double* sum, double* product, int threads);

// Writes dy, which may be dz's own memory.
void norm_relu_backward(const NormReluProblem& problem, const NormReluCoefficients& coefficients,
                        const void* y, const void* dz, void* dy, int threads);

// Batch normalisation as the passes above make it up. The affine parameters, the statistics and
// their gradients are `channels` doubles each.
struct NormReluAffine {
  const double* weight;
  const double* bias;
  double eps;
};

// z = (x - mean) / sqrt(variance + eps) * weight + bias (+ residual), by the statistics of x, which
// are written to mean and variance; see norm_relu_apply.
void normalise(const NormReluProblem& problem, const NormReluAffine& affine, const void* y,
               const void* residual, double* mean, double* variance, void* z, int threads);

// The same z by statistics that are known already.
void normalise_again(const NormReluProblem& problem, const NormReluAffine& affine,
                     const double* mean, const double* variance, const void* y, void* z,
                     int threads);

// Adds `more` to dz unless it is null; writes the gradients of weight and bias and, unless it is
// null, dy, which may be dz's own memory.
void normalise_backward(const NormReluProblem& problem, const NormReluAffine& affine,
                        const double* mean, const double* variance, const void* y, void* dz,
                        const void* more, void* dy, double* dweight, double* dbias, int threads);

// A stretch of the matrix that one thread takes at a time. Rows are folded: several side by side
// make one, so that any number of channels fills vectors. Coefficients are as wide as such a row
// and of the type that is computed in.
struct NormReluTask {
  DType dtype;
  bool relu;
  int64_t rows;
  int64_t width;
};

// The kernels of one instruction set.
struct NormReluKernels {
  // Mean of each column, and its sum of squared distances from it.
  void (*statistics)(const NormReluTask&, const void* y, double* mean, double* squares);
  void (*apply)(const NormReluTask&, const void* y, const void* residual, const void* mean,
                const void* scale, const void* bias, void* z);
  void (*reduce)(const NormReluTask&, const void* y, void* dz, const void* more, const void* mean,
                 double* sum, double* product);
  void (*backward)(const NormReluTask&, const void* y, const void* dz, const void* mean,
                   const void* scale, const void* offset, const void* slope, void* dy);
};

namespace baseline {
extern const NormReluKernels norm_relu_kernels;
}
namespace avx2 {
extern const NormReluKernels norm_relu_kernels;
}
namespace avx512 {
extern const NormReluKernels norm_relu_kernels;
}
namespace neon {
extern const NormReluKernels norm_relu_kernels;
}

}  // namespace ca3d
