// One SGD step of pre-parameters under a linear map, over many tensors at once.
//
// Element by element, with theta the pre-parameter, m its momentum, g the gradient of the weight w:
//   d = gradient_scale * g + weight_decay * theta
//   m = momentum * m + (1 - dampening) * d                 (without momentum: m = d, not stored)
//   theta = theta - lr * (nesterov ? d + momentum * m : m)
//   w = theta / scale, from theta as it is stored
// in float (double for double tensors), each product and sum rounded on its own (never fused, so
// that every instruction set gives the same bits); each stored value is rounded once.
//
// Compensated rounding of theta keeps what theta lacks, r, and steps theta + r, which takes the
// place of theta in d:
//   e = r - lr * (...)
//   theta' = theta + e, as it is stored
//   r = e - (theta' - theta)
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ca3d {

// What is written for a theta or momentum that its storage, if of 16 bits, can't hold exactly; w
// and what is wider are rounded to nearest. Stochastic rounding takes 16 random bits for each
// value, see common/philox.h.
enum class Rounding { kNearest, kStochastic, kCompensated };

struct PreParamStep {
  DType param;      // of w and g
  DType pre_param;  // of theta and m: as param, or float for param in half precision
  double lr, momentum, dampening, weight_decay;
  double scale, gradient_scale;
  bool nesterov;
  Rounding rounding;
  // Of stochastic rounding.
  uint64_t seed;
  uint32_t steps;  // that came before
};

// One tensor, with what belongs to it, each contiguous in memory. Momentum is null for a step
// without, compensation (r) for other roundings.
struct PreParamRun {
  void* param;
  const void* grad;
  void* pre_param;
  void* momentum;
  void* compensation;
  int64_t count;
  uint32_t number;  // of the tensor, for stochastic rounding
};

// A part of a tensor: its addresses are those of the element `first`.
struct PreParamPiece {
  PreParamRun run;
  int64_t first;
};

// Longest run that one thread takes at a time.
constexpr int64_t kPreParamRun = 16384;

// The rounding that the stored types really get: theta of more than 16 bits is rounded to nearest.
Rounding applied_rounding(const PreParamStep& step);

// Throws std::invalid_argument for options, types or runs that don't fit together.
void check(const PreParamStep& step, const PreParamRun* runs, int64_t count);

// What the magnitudes of theta and m don't exceed in a piece of a run: on a CPU of kPreParamRun
// elements (the last of a run may be shorter), where it is reached unless rounding is stochastic,
// in double; on a GPU of a block's chunk, where it always is, in the type that is computed in. NaN
// when nothing is known; not finite when a number isn't.
template <class Real>
struct PreParamLargest {
  Real pre_param, momentum;
};

// Steps every run; throws std::invalid_argument for options, types or runs that don't fit together.
// `largest` is null or takes what was stored, one entry for each piece, run after run.
void preparam_sgd_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       int threads, PreParamLargest<double>* largest = nullptr);

// Whether the step would store a value that isn't finite (with any draw, if rounding is
// stochastic), or g holds one. Writes nothing. Where `largest` bounds all that a piece could
// become, of that piece only g is read.
bool preparam_sgd_step_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                                 int threads, const PreParamLargest<double>* largest = nullptr);

// The kernels of one instruction set. They take checked pieces of at most kPreParamRun elements,
// the first of which is a multiple of kPreParamRun.
struct PreParamKernels {
  void (*step)(const PreParamStep&, const PreParamPiece*, int64_t count, int threads,
               PreParamLargest<double>*);
  bool (*overflows)(const PreParamStep&, const PreParamPiece*, int64_t count, int threads,
                    const PreParamLargest<double>*);
};

namespace baseline {
extern const PreParamKernels preparam_kernels;
}
namespace avx2 {
extern const PreParamKernels preparam_kernels;
}
namespace avx512 {
extern const PreParamKernels preparam_kernels;
}
namespace neon {
extern const PreParamKernels preparam_kernels;
}

}  // namespace ca3d
