// Runs every kind of launch with a few blocks, for ThreadSanitizer: a fiber costs it some 50
// microseconds. Prints the number of blocks of each launch.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/dtype_info.h"
#include "local_attention/cuda_plan.h"
#include "preparam_step/preparam_step_cuda.h"

namespace {

using ca3d::DType;
using ca3d::Edge;
using ca3d::LocalAttentionLaunch;
using ca3d::LocalAttentionProblem;
using ca3d::StridedRows;

// A contiguous tensor of zeros. `shift` elements more move it off the multiples of 16 bytes.
class Tensor {
 public:
  Tensor(const LocalAttentionProblem& p, int64_t shift)
      : p_(p),
        shift_(shift * ca3d::stored_bytes(p.dtype)),
        memory_(p.outer * p.inner * p.heads * p.frames * p.head_dim * ca3d::stored_bytes(p.dtype) +
                shift_) {}

  StridedRows rows() {
    const int64_t frame = p_.head_dim, head = frame * p_.frames, inner = head * p_.heads;
    return {memory_.data() + shift_, inner * p_.inner, inner, head, frame};
  }

 private:
  LocalAttentionProblem p_;
  int64_t shift_;
  std::vector<char> memory_;
};

void run(const LocalAttentionLaunch& launch) {
  std::printf("%s: %u blocks\n", entry_name(launch).c_str(), launch.grid);
  run_local_attention(launch, 0, nullptr);
}

void attend(const LocalAttentionProblem& p, int64_t shift = 0) {
  Tensor q(p, shift), k(p, shift), v(p, shift), o(p, shift), go(p, shift), dq(p, shift),
      dk(p, shift), dv(p, shift);
  run(plan_forward(p, q.rows(), k.rows(), v.rows(), o.rows()));
  run(plan_backward(p, q.rows(), k.rows(), v.rows(), go.rows(), dq.rows(), dk.rows(), dv.rows()));
}

void step(int tensors, int64_t count, ca3d::Rounding rounding) {
  const ca3d::PreParamStep options = {DType::kFloat16, DType::kFloat16, 0.1, 0.9, 0, 0, 128, 1,
                                      false,           rounding,        7,   3};
  std::vector<std::vector<uint16_t>> memory(static_cast<size_t>(5 * tensors),
                                            std::vector<uint16_t>(static_cast<size_t>(count)));
  const bool compensated = rounding == ca3d::Rounding::kCompensated;
  std::vector<ca3d::PreParamRun> runs;
  for (size_t i = 0; i < memory.size(); i += 5) {
    runs.push_back({memory[i].data(), memory[i + 1].data(), memory[i + 2].data(),
                    memory[i + 3].data(), compensated ? memory[i + 4].data() : nullptr, count, 0});
  }
  memory[1][0] = 0x7c00;  // infinity
  float found_inf = 0, none = 0;
  const int64_t blocks = tensors * ((count - 1) / ca3d::kPreParamChunk + 1);
  std::vector<ca3d::PreParamLargest<float>> largest(static_cast<size_t>(blocks));
  run_preparam_overflows(options, runs.data(), tensors, {nullptr, &found_inf, nullptr}, 0, nullptr);
  run_preparam_step(options, runs.data(), tensors, {}, 0, nullptr);
  // Overwrites the infinity that the step before has left.
  std::memset(memory[2].data(), 0, memory[2].size() * 2);
  std::memset(memory[3].data(), 0, memory[3].size() * 2);
  memory[1][0] = 0;
  run_preparam_step(options, runs.data(), tensors, {nullptr, &none, largest.data()}, 0, nullptr);
  run_preparam_overflows(options, runs.data(), tensors, {nullptr, &none, largest.data()}, 0,
                         nullptr);
  std::printf("preparam_step: %d tensors, found_inf %g, then %g\n", tensors, found_inf, none);
}

}  // namespace

int main() {
  for (const int order : {emulation::kForward, emulation::kRandom}) {
    emulation::set_order(order);
    attend({DType::kFloat16, 1, 5, 1, 8, 64, {5, 1, false, Edge::kTruncate}, 0.1, nullptr});
    attend({DType::kFloat32, 1, 2, 1, 12, 24, {3, 2, false, Edge::kShift}, 0.1, nullptr});
    attend({DType::kFloat32, 1, 1, 1, 110, 128, {4, 1, true, Edge::kTruncate}, 0.1, nullptr});
    attend({DType::kFloat64, 1, 1, 1, 40, 128, {70, 1, false, Edge::kShift}, 0.1, nullptr});
    attend({DType::kBFloat16, 1, 2, 1, 6, 20, {9, 1, false, Edge::kZero}, 0.1, nullptr}, 1);
    const int64_t table[] = {1, 0, 0, 2, 1, 1, 1, 2, 1, 0, 0, 0};
    attend({DType::kFloat16, 1, 2, 2, 7, 64, {3, 1, false, Edge::kZero}, 0.1, table});
    for (const auto rounding :
         {ca3d::Rounding::kNearest, ca3d::Rounding::kStochastic, ca3d::Rounding::kCompensated}) {
      step(2, 4100, rounding);
    }
  }
  std::printf("done\n");
  return 0;
}
