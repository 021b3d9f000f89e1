// Checks a call, plans it and runs the kernels of the instruction set in use on several threads.
#include "local_attention/local_attention.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

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

// Sizes below this bound can be multiplied by small numbers without overflow.
constexpr int64_t kHugeSize = int64_t{1} << 40;

void require(bool condition, const std::string& name, int64_t value, const char* allowed) {
  if (condition) return;
  throw std::invalid_argument(name + " must be " + allowed + ", got " + std::to_string(value));
}

void check_size(const char* name, int64_t value, int64_t least) {
  require(value >= least, name, value, least == 0 ? "at least 0" : "at least 1");
  require(value < kHugeSize, name, value, "less than 2**40");
}

void check_key_table(const LocalAttentionProblem& p) {
  if (!p.key_table) return;
  if (p.window.edge != Edge::kZero || p.window.dilation != 1 || p.window.causal) {
    throw std::invalid_argument("key_table needs edge 1 (zero), dilation 1 and causal 0");
  }
  for (int64_t i = 0; i < p.heads * p.window.kernel_size; ++i) {
    const int64_t head = p.key_table[2 * i], slot = p.key_table[2 * i + 1];
    require(head >= 0 && head < p.heads, "key_table head", head, "one of the heads");
    require(slot >= 0 && slot < p.window.kernel_size, "key_table slot", slot, "in the window");
  }
}

void check(const LocalAttentionProblem& p, int threads) {
  check_size("outer", p.outer, 0);
  check_size("inner", p.inner, 0);
  check_size("heads", p.heads, 1);
  check_size("frames", p.frames, 1);
  check_size("head_dim", p.head_dim, 1);
  check_size("kernel_size", p.window.kernel_size, 1);
  check_size("dilation", p.window.dilation, 1);
  require(threads >= 1, "threads", threads, "at least 1");
  if (!std::isfinite(p.scale)) {
    throw std::invalid_argument("scale must be finite, got " + std::to_string(p.scale));
  }
  const double elements = static_cast<double>(p.outer) * static_cast<double>(p.inner) *
                          static_cast<double>(p.heads) * static_cast<double>(p.frames) *
                          static_cast<double>(p.head_dim);
  if (elements > static_cast<double>(std::numeric_limits<int64_t>::max() / 16)) {
    throw std::invalid_argument("sizes must describe a tensor that fits into memory");
  }
  check_key_table(p);
}

void check_pointer(const char* name, const StridedRows& rows) {
  if (!rows.data) throw std::invalid_argument(std::string(name) + " must not be a null pointer");
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

constexpr std::size_t kAlignment = 64;

std::unique_ptr<char, Free> allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(static_cast<char*>(memory));
}

using Kernel = void (*)(const LocalAttentionTables&, int64_t, int64_t, void*);

void run(const LocalAttentionProblem& problem, const StridedRows* tensor, int threads,
         Kernel LocalAttentionKernels::* kernel) {
  const LocalAttentionKernels& isa = kernels();
  const LocalAttentionPlan plan(problem, tensor, isa.vector_bytes);
  if (threads > plan.items()) threads = static_cast<int>(plan.items());
  const std::size_t bytes = isa.scratch_bytes(plan.tables());
  const std::unique_ptr<char, Free> scratch = allocate(bytes * static_cast<std::size_t>(threads));
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
