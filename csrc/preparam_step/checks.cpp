#include <cmath>
#include <stdexcept>
#include <string>

#include "preparam_step/preparam_step.h"

namespace ca3d {
namespace {

void require(bool condition, const char* name, double value, const char* allowed) {
  if (condition) return;
  throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " +
                              std::to_string(value));
}

bool is_half(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

void check(const PreParamStep& step) {
  require(std::isfinite(step.lr), "lr", step.lr, "finite");
  require(std::isfinite(step.momentum), "momentum", step.momentum, "finite");
  require(std::isfinite(step.dampening), "dampening", step.dampening, "finite");
  require(std::isfinite(step.weight_decay), "weight_decay", step.weight_decay, "finite");
  require(std::isfinite(step.gradient_scale), "gradient_scale", step.gradient_scale, "finite");
  require(std::isfinite(step.scale) && step.scale != 0, "scale", step.scale, "finite and not zero");
  const bool mixed = is_half(step.param) && step.pre_param == DType::kFloat32;
  if (step.pre_param != step.param && !mixed) {
    throw std::invalid_argument(
        "pre_param must have the type of param, or float32 with a param of float16 or bfloat16");
  }
}

}  // namespace

Rounding applied_rounding(const PreParamStep& step) {
  return is_half(step.pre_param) ? step.rounding : Rounding::kNearest;
}

void check(const PreParamStep& step, const PreParamRun* runs, int64_t count) {
  check(step);
  const PreParamRun* first = nullptr;  // that isn't empty
  for (int64_t i = 0; i < count; ++i) {
    const PreParamRun& run = runs[i];
    if (run.count < 0) {
      throw std::invalid_argument("tensor " + std::to_string(i) + " has " +
                                  std::to_string(run.count) + " elements");
    }
    if (run.count == 0) continue;
    if (!(run.param && run.grad && run.pre_param)) {
      throw std::invalid_argument("tensor " + std::to_string(i) + " has a null pointer");
    }
    if (!first) first = &run;
    if (!run.momentum != !first->momentum) {
      throw std::invalid_argument("either all tensors have a momentum or none, see tensor " +
                                  std::to_string(i));
    }
    if (!run.compensation != (applied_rounding(step) != Rounding::kCompensated)) {
      throw std::invalid_argument(
          "tensors must have a compensation if and only if rounding is compensated, see tensor " +
          std::to_string(i));
    }
  }
}

}  // namespace ca3d
