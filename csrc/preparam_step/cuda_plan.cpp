#include <cstddef>
#include <cstring>
#include <limits>

#include "common/dtype_info.h"
#include "common/unsupported.h"
#include "preparam_step/preparam_step_cuda.h"

namespace ca3d {
namespace {

template <class Argument>
std::vector<char> bytes_of(const Argument& argument) {
  std::vector<char> bytes(sizeof argument);
  std::memcpy(bytes.data(), &argument, sizeof argument);
  return bytes;
}

template <class Real, int kTensors>
std::vector<ArgumentField> fields_of(const PreParamStep& step, const PreParamLaunch& launch) {
  using Arguments = PreParamArguments<Real, kTensors>;
  const std::string real = sizeof(Real) == 8 ? "double" : "float";
  const std::string param = dtype_name(step.param), wide = dtype_name(step.pre_param);
  std::vector<ArgumentField> fields;
  const char* numbers[] = {"lr",           "momentum", "1 - dampening",
                           "weight_decay", "scale",    "gradient_scale"};
  for (size_t i = 0; i < 6; ++i) {
    fields.push_back({std::string("numbers[") + std::to_string(i) + "]",
                      offsetof(Arguments, numbers) + i * sizeof(Real), real, numbers[i]});
  }
  fields.push_back({"device.numbers", offsetof(Arguments, device.numbers), "double*",
                    "lr, momentum, 1 - dampening, weight_decay, scale, gradient_scale, or null"});
  fields.push_back(
      {"device.found_inf", offsetof(Arguments, device.found_inf), "float*",
       "1 element: a step is skipped unless it is 0, or null; overflows sets it to 1"});
  fields.push_back({"device.largest", offsetof(Arguments, device.largest), real + "*",
                    "largest |theta| and |momentum| of each block, or null: written by a step; "
                    "overflows reads only gradients where they suffice, NaN where unknown"});
  fields.push_back({"seed", offsetof(Arguments, seed), "uint64_t", "of stochastic rounding"});
  fields.push_back({"steps", offsetof(Arguments, steps), "uint32_t", "that came before"});
  fields.push_back({"nesterov", offsetof(Arguments, nesterov), "int32_t", "0 or 1"});
  fields.push_back({"tensors", offsetof(Arguments, tensors), "int32_t", "rows of the table"});
  for (int32_t i = 0; i <= launch.tensors; ++i) {
    fields.push_back({"first_block[" + std::to_string(i) + "]",
                      offsetof(Arguments, first_block) + static_cast<size_t>(i) * 4, "uint32_t",
                      "first block of the tensor"});
  }
  for (int32_t i = 0; i < launch.tensors; ++i) {
    const std::string row = "runs[" + std::to_string(i) + "].";
    const size_t at = offsetof(Arguments, runs) + static_cast<size_t>(i) * sizeof(PreParamRun);
    fields.push_back({row + "param", at + offsetof(PreParamRun, param), param + "*", "written: w"});
    fields.push_back(
        {row + "grad", at + offsetof(PreParamRun, grad), param + "*", "gradient of w"});
    fields.push_back(
        {row + "pre_param", at + offsetof(PreParamRun, pre_param), wide + "*", "theta, updated"});
    fields.push_back({row + "momentum", at + offsetof(PreParamRun, momentum), wide + "*",
                      "momentum, updated, or null"});
    fields.push_back({row + "compensation", at + offsetof(PreParamRun, compensation), wide + "*",
                      "what theta lacks, updated, or null"});
    fields.push_back({row + "count", at + offsetof(PreParamRun, count), "int64_t", "elements"});
    fields.push_back(
        {row + "number", at + offsetof(PreParamRun, number), "uint32_t", "of the tensor"});
  }
  return fields;
}

}  // namespace

std::vector<PreParamRun> nonempty(const PreParamRun* runs, int64_t count) {
  std::vector<PreParamRun> kept;
  for (int64_t i = 0; i < count; ++i) {
    if (runs[i].count > 0) kept.push_back(runs[i]);
  }
  return kept;
}

std::vector<PreParamLaunch> plan_preparam(const PreParamRun* runs, int64_t count,
                                          bool allow_large) {
  std::vector<PreParamLaunch> launches;
  const bool large = allow_large && count > kSmallTable;
  const int64_t most = large ? kLargeTable : kSmallTable;
  int64_t first_block = 0;
  for (int64_t first = 0; first < count; first += most) {
    const int64_t tensors = count - first < most ? count - first : most;
    int64_t blocks = 0;
    for (int64_t i = first; i < first + tensors; ++i) {
      blocks += (runs[i].count - 1) / kPreParamChunk + 1;
      if (blocks > std::numeric_limits<int32_t>::max()) {
        throw Unsupported("the tensors have more than 2**31 blocks of 4096 elements");
      }
    }
    launches.push_back(
        {first, first_block, static_cast<int32_t>(tensors), large, static_cast<unsigned>(blocks)});
    first_block += blocks;
  }
  return launches;
}

size_t shared_bytes(const PreParamStep& step) {
  return step.pre_param == DType::kFloat64 ? kPreParamShared<double> : kPreParamShared<float>;
}

std::string entry_name(const PreParamStep& step, const PreParamLaunch& launch, bool overflows) {
  const Rounding rounding = applied_rounding(step);
  return std::string(overflows ? "ca3d_preparam_overflows_" : "ca3d_preparam_step_") +
         dtype_name(step.param) + "_" + dtype_name(step.pre_param) +
         (rounding == Rounding::kStochastic    ? "_stochastic"
          : rounding == Rounding::kCompensated ? "_compensated"
                                               : "") +
         (launch.large ? "_large" : "_small");
}

std::vector<char> argument_bytes(const PreParamStep& step, const PreParamLaunch& launch,
                                 const PreParamRun* runs, const PreParamDevice& device) {
  if (step.pre_param == DType::kFloat64) {
    return launch.large ? bytes_of(arguments_of<double, kLargeTable>(step, launch, runs, device))
                        : bytes_of(arguments_of<double, kSmallTable>(step, launch, runs, device));
  }
  return launch.large ? bytes_of(arguments_of<float, kLargeTable>(step, launch, runs, device))
                      : bytes_of(arguments_of<float, kSmallTable>(step, launch, runs, device));
}

std::vector<ArgumentField> argument_fields(const PreParamStep& step, const PreParamLaunch& launch) {
  if (step.pre_param == DType::kFloat64) {
    return launch.large ? fields_of<double, kLargeTable>(step, launch)
                        : fields_of<double, kSmallTable>(step, launch);
  }
  return launch.large ? fields_of<float, kLargeTable>(step, launch)
                      : fields_of<float, kSmallTable>(step, launch);
}

}  // namespace ca3d
