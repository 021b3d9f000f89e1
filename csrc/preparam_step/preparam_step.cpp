// Checks a step and hands it to the kernels of the instruction set in use.
#include "preparam_step/preparam_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"

namespace ca3d {
namespace {

// A team of threads costs more than it saves on fewer elements.
constexpr int64_t kWorthThreads = 32768;

const PreParamKernels& kernels() {
  switch (current_isa()) {
#ifdef CA3D_HAVE_avx512
    case Isa::kAvx512:
      return avx512::preparam_kernels;
#endif
#ifdef CA3D_HAVE_avx2
    case Isa::kAvx2:
      return avx2::preparam_kernels;
#endif
#ifdef CA3D_HAVE_neon
    case Isa::kNeon:
      return neon::preparam_kernels;
#endif
    default:
      return baseline::preparam_kernels;
  }
}

void check(const PreParamStep& step, const PreParamRun* runs, int64_t count, int threads) {
  ca3d::check(step, runs, count);
  if (threads >= 1) return;
  throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

char* advance(void* start, int64_t elements, DType dtype) {
  return start ? static_cast<char*>(start) + elements * element_size(dtype) : nullptr;
}

// The runs cut into pieces of at most kPreParamRun elements, so that threads share the work evenly.
std::vector<PreParamPiece> pieces(const PreParamStep& step, const PreParamRun* runs,
                                  int64_t count) {
  std::vector<PreParamPiece> cut;
  for (int64_t i = 0; i < count; ++i) {
    const PreParamRun& run = runs[i];
    for (int64_t at = 0; at < run.count; at += kPreParamRun) {
      cut.push_back(
          {{advance(run.param, at, step.param),
            advance(const_cast<void*>(run.grad), at, step.param),
            advance(run.pre_param, at, step.pre_param), advance(run.momentum, at, step.pre_param),
            advance(run.compensation, at, step.pre_param), std::min(kPreParamRun, run.count - at),
            run.number},
           at});
    }
  }
  return cut;
}

int team(const std::vector<PreParamPiece>& cut, int threads) {
  int64_t elements = 0;
  for (const PreParamPiece& piece : cut) elements += piece.run.count;
  return elements < kWorthThreads ? 1 : threads;
}

}  // namespace

void preparam_sgd_step(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                       int threads, PreParamLargest<double>* largest) {
  check(step, runs, count, threads);
  const std::vector<PreParamPiece> cut = pieces(step, runs, count);
  kernels().step(step, cut.data(), static_cast<int64_t>(cut.size()), team(cut, threads), largest);
}

bool preparam_sgd_step_overflows(const PreParamStep& step, const PreParamRun* runs, int64_t count,
                                 int threads, const PreParamLargest<double>* largest) {
  check(step, runs, count, threads);
  const std::vector<PreParamPiece> cut = pieces(step, runs, count);
  return kernels().overflows(step, cut.data(), static_cast<int64_t>(cut.size()), team(cut, threads),
                             largest);
}

}  // namespace ca3d
