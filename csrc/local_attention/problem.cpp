#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "local_attention/local_attention.h"

namespace ca3d {
namespace {

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

}  // namespace

void check(const LocalAttentionProblem& p) {
  check_size("outer", p.outer, 0);
  check_size("inner", p.inner, 0);
  check_size("heads", p.heads, 1);
  check_size("frames", p.frames, 1);
  check_size("head_dim", p.head_dim, 1);
  check_size("kernel_size", p.window.kernel_size, 1);
  check_size("dilation", p.window.dilation, 1);
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

}  // namespace ca3d
