// The pre-parameter SGD step on a GPU: all tensors of a group by one launch, or a few.
//
// The table of tensors is part of the kernel's argument, so that nothing is copied to the device
// before a launch and nothing has to outlive it. A launch can be captured in a CUDA graph; numbers
// that change from replay to replay lie in device memory then.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/argument_field.h"
#include "preparam_step/preparam_step.h"

namespace ca3d {

// Elements of one tensor that one block steps.
constexpr int kPreParamChunk = 4096;
constexpr int kPreParamThreads = 256;

// Tensors of a launch: with a small table the argument is below 4 KB, the limit of CUDA
// before 12.1, with a large one below 32 KB.
constexpr int kSmallTable = 64;
constexpr int kLargeTable = 512;

// Device addresses, each null for none.
struct PreParamDevice {
  // PreParamNumbers, in their order: used instead of the step's own.
  const double* numbers;
  // A step does nothing if it holds anything but 0; the overflow kernel sets it to 1.
  float* found_inf;
  // PreParamLargest of every block, launch after launch, in the type that is computed in. A step
  // writes them; where they tell that nothing can overflow, the overflow kernel reads no more than
  // g. They must be true, or hold NaN, when it runs.
  void* largest;
};

// The numbers of a step in the type that it computes in; `fresh` is 1 - dampening.
template <class Real>
struct PreParamNumbers {
  Real lr, momentum, fresh, weight_decay, scale, gradient_scale;
};

// The only parameter of every kernel, by value.
template <class Real, int kTensors>
struct PreParamArguments {
  PreParamNumbers<Real> numbers;
  PreParamDevice device;
  uint64_t seed;
  uint32_t steps;
  int32_t nesterov;
  int32_t tensors;
  // Chunks of tensor i are those of the blocks first_block[i] .. first_block[i + 1] - 1.
  uint32_t first_block[kTensors + 1];
  PreParamRun runs[kTensors];
};

// One launch: the tensors first .. first + tensors - 1 of a table without empty ones.
struct PreParamLaunch {
  int64_t first;
  int64_t first_block;  // of those of all launches
  int32_t tensors;
  bool large;
  unsigned grid;
};

// Whether large tables can be launched: the toolkit that built the library and the driver must both
// know arguments above 4 KB. Without a driver launches are only described, as the library was
// built.
bool allows_large_tables();

// Splits a table into launches. Throws Unsupported for tensors beyond 2^31 blocks.
std::vector<PreParamLaunch> plan_preparam(const PreParamRun* runs, int64_t count, bool allow_large);

// Dynamic shared memory of every kernel: largest magnitudes of each warp.
template <class Real>
constexpr size_t kPreParamShared = kPreParamThreads / 32 * sizeof(PreParamLargest<Real>);
size_t shared_bytes(const PreParamStep& step);

// Name of the kernel in the compiled code, such as ca3d_preparam_step_float16_float32_small or,
// where rounding isn't to nearest, ca3d_preparam_step_float16_float16_stochastic_small.
std::string entry_name(const PreParamStep& step, const PreParamLaunch& launch, bool overflows);

// The kernel's argument, as bytes.
std::vector<char> argument_bytes(const PreParamStep& step, const PreParamLaunch& launch,
                                 const PreParamRun* runs, const PreParamDevice& device);

// The fields of that argument.
std::vector<ArgumentField> argument_fields(const PreParamStep& step, const PreParamLaunch& launch);

// The table without its empty tensors.
std::vector<PreParamRun> nonempty(const PreParamRun* runs, int64_t count);

// Queue the kernels for a checked table on a stream of a device. Throw CudaError.
void run_preparam_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       const PreParamDevice& addresses, int device, void* stream);
void run_preparam_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                            const PreParamDevice& addresses, int device, void* stream);

template <class Real>
PreParamNumbers<Real> numbers_of(const PreParamStep& step) {
  return {static_cast<Real>(step.lr),
          static_cast<Real>(step.momentum),
          static_cast<Real>(1 - step.dampening),
          static_cast<Real>(step.weight_decay),
          static_cast<Real>(step.scale),
          static_cast<Real>(step.gradient_scale)};
}

template <class Real, int kTensors>
PreParamArguments<Real, kTensors> arguments_of(const PreParamStep& step,
                                               const PreParamLaunch& launch,
                                               const PreParamRun* runs,
                                               const PreParamDevice& device) {
  PreParamArguments<Real, kTensors> a{};
  a.numbers = numbers_of<Real>(step);
  a.device = device;
  if (device.largest) {
    a.device.largest = static_cast<PreParamLargest<Real>*>(device.largest) + launch.first_block;
  }
  a.seed = step.seed;
  a.steps = step.steps;
  a.nesterov = step.nesterov;
  a.tensors = launch.tensors;
  for (int32_t i = 0; i < launch.tensors; ++i) {
    a.runs[i] = runs[launch.first + i];
    const int64_t chunks = (a.runs[i].count + kPreParamChunk - 1) / kPreParamChunk;
    a.first_block[i + 1] = a.first_block[i] + static_cast<uint32_t>(chunks);
  }
  return a;
}

}  // namespace ca3d
