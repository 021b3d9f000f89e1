// Checks a call, plans it and runs the kernels of the instruction set in use on several threads.
#include "local_attention/local_attention.h"

#include <stdexcept>
#include <string>

#include "common/aligned.h"
#include "common/dispatch.h"
#include "common/threading.h"
#include "local_attention/plan.h"

namespace ca3d {
namespace {

const LocalAttentionKernels& kernels() {
  switch (current_isa()) {
#ifdef CA3D_HAVE_avx512
    case Isa::kAvx512:
      return avx512::local_attention_kernels;
#endif
#ifdef CA3D_HAVE_avx2
    case Isa::kAvx2:
      return avx2::local_attention_kernels;
#endif
#ifdef CA3D_HAVE_neon
    case Isa::kNeon:
      return neon::local_attention_kernels;
#endif
    default:
      return baseline::local_attention_kernels;
  }
}

void check(const LocalAttentionProblem& problem, int threads) {
  ca3d::check(problem);
  if (threads >= 1) return;
  throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
}

void check_pointer(const char* name, const StridedRows& rows) {
  if (!rows.data) throw std::invalid_argument(std::string(name) + " must not be a null pointer");
}

using Kernel = void (*)(const LocalAttentionTables&, int64_t, int64_t, void*);

void run(const LocalAttentionProblem& problem, const StridedRows* tensor, int threads,
         Kernel LocalAttentionKernels::* kernel) {
  const LocalAttentionKernels& isa = kernels();
  const LocalAttentionPlan plan(problem, tensor, isa.vector_bytes);
  if (threads > plan.items()) threads = static_cast<int>(plan.items());
  const std::size_t bytes = isa.scratch_bytes(plan.tables());
  const AlignedMemory scratch = allocate_aligned(bytes * static_cast<std::size_t>(threads));
  parallel_ranges(plan.items(), threads, [&](int thread, int64_t begin, int64_t end) {
    (isa.*kernel)(plan.tables(), begin, end, scratch.get() + bytes * thread);
  });
}

}  // namespace

void local_attention_forward(const LocalAttentionProblem& problem, const StridedRows& q,
                             const StridedRows& k, const StridedRows& v, const StridedRows& o,
                             int threads) {
  check(problem, threads);
  if (problem.outer == 0 || problem.inner == 0) return;
  check_pointer("q", q);
  check_pointer("k", k);
  check_pointer("v", v);
  check_pointer("o", o);
  StridedRows tensor[kOperands] = {};
  tensor[kQ] = q;
  tensor[kK] = k;
  tensor[kV] = v;
  tensor[kO] = o;
  run(problem, tensor, threads, &LocalAttentionKernels::forward);
}

void local_attention_backward(const LocalAttentionProblem& problem, const StridedRows& q,
                              const StridedRows& k, const StridedRows& v, const StridedRows& go,
                              const StridedRows& dq, const StridedRows& dk, const StridedRows& dv,
                              int threads) {
  check(problem, threads);
  if (problem.outer == 0 || problem.inner == 0) return;
  check_pointer("q", q);
  check_pointer("k", k);
  check_pointer("v", v);
  check_pointer("do", go);
  check_pointer("dq", dq);
  check_pointer("dk", dk);
  check_pointer("dv", dv);
  const StridedRows tensor[kOperands] = {q, k, v, {}, go, dq, dk, dv};
  run(problem, tensor, threads, &LocalAttentionKernels::backward);
}

}  // namespace ca3d
