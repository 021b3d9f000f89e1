// The emulated CUDA kernels under the names of the CPU kernels, so that the parity programs of the
// latter try them. The orders in which threads run take the place of the instruction sets.
#include <array>
#include <stdexcept>

#include "common/dispatch.h"
#include "local_attention/cuda_plan.h"
#include "preparam_step/preparam_step_cuda.h"

namespace ca3d {
namespace {

constexpr std::array<const char*, emulation::kOrders> kNames = {"forward", "reverse", "random",
                                                                "rotating"};

bool is_empty(const LocalAttentionProblem& p) {
  return p.outer == 0 || p.inner == 0;
}

}  // namespace

Isa current_isa() {
  return static_cast<Isa>(emulation::state.order);
}

const char* isa_name(Isa isa) {
  return kNames.at(static_cast<size_t>(isa));
}

std::vector<std::string> supported_isas() {
  return {kNames.begin(), kNames.end()};
}

void set_isa(const std::string& name) {
  for (int order = 0; order < emulation::kOrders; ++order) {
    if (name == kNames.at(static_cast<size_t>(order))) emulation::set_order(order);
  }
}

void local_attention_forward(const LocalAttentionProblem& problem, const StridedRows& q,
                             const StridedRows& k, const StridedRows& v, const StridedRows& o,
                             int /*threads*/) {
  check(problem);
  if (!is_empty(problem)) run_local_attention(plan_forward(problem, q, k, v, o), 0, nullptr);
}

void local_attention_backward(const LocalAttentionProblem& problem, const StridedRows& q,
                              const StridedRows& k, const StridedRows& v, const StridedRows& go,
                              const StridedRows& dq, const StridedRows& dk, const StridedRows& dv,
                              int /*threads*/) {
  check(problem);
  if (is_empty(problem)) return;
  run_local_attention(plan_backward(problem, q, k, v, go, dq, dk, dv), 0, nullptr);
}

void preparam_sgd_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       int /*threads*/, PreParamLargest<double>* /*largest*/) {
  check(step, runs, count);
  run_preparam_step(step, runs, count, {}, 0, nullptr);
}

bool preparam_sgd_step_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                                 int /*threads*/, const PreParamLargest<double>* /*largest*/) {
  check(step, runs, count);
  float found_inf = 0;
  run_preparam_overflows(step, runs, count, {nullptr, &found_inf, nullptr}, 0, nullptr);
  return found_inf != 0;
}

}  // namespace ca3d
