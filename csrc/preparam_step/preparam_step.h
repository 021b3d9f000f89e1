// One SGD step of pre-parameters under a linear map, over many tensors at once.
//
// Element by element, with theta the pre-parameter, m its momentum, g the gradient of the weight w:
//   d = gradient_scale * g + weight_decay * theta
//   m = momentum * m + (1 - dampening) * d                 (without momentum: m = d, not stored)
//   theta = theta - lr * (nesterov ? d + momentum * m : m)
//   w = theta / scale, from theta as it is stored
// in float (double for double tensors), each product and sum rounded on its own (never fused, so
// that every instruction set gives the same bits); each stored value is rounded once.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace ca3d {

// What is written for a value that its storage can't hold exactly.
enum class Rounding { kNearest };

struct PreParamStep {
  DType param;      // of w and g
  DType pre_param;  // of theta and m: as param, or float for param in half precision
  double lr, momentum, dampening, weight_decay;
  double scale, gradient_scale;
  bool nesterov;
  Rounding rounding;
};

// The same run of elements of the four tensors. All are contiguous in memory; momentum is null for
// a step without.
struct PreParamRun {
  void* param;
  const void* grad;
  void* pre_param;
  void* momentum;
  int64_t count;
};

// Longest run that one thread takes at a time.
constexpr int64_t kPreParamRun = 16384;

// Throws std::invalid_argument for options, types or runs that don't fit together.
void check(const PreParamStep& step, const PreParamRun* runs, int64_t count);

// Largest magnitudes of theta and m in a piece of kPreParamRun elements (the last of a run may be
// shorter). NaN when they are not known.
struct PreParamLargest {
  double pre_param, momentum;
};

// Steps every run; throws std::invalid_argument for options, types or runs that don't fit together.
// `largest` is null or takes what was stored, one entry for each piece, run after run.
void preparam_sgd_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       int threads, PreParamLargest* largest = nullptr);

// Whether the step would store a value that isn't finite, or g holds one. Writes nothing. Where
// `largest` bounds all that a piece could become, of that piece only g is read.
bool preparam_sgd_step_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                                 int threads, const PreParamLargest* largest = nullptr);

// The kernels of one instruction set. They take checked runs of at most kPreParamRun elements.
struct PreParamKernels {
  void (*step)(const PreParamStep&, const PreParamRun*, int64_t count, int threads,
               PreParamLargest*);
  bool (*overflows)(const PreParamStep&, const PreParamRun*, int64_t count, int threads,
                    const PreParamLargest*);
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
