// Checks a call, brings its weights into the form that the kernels read, and runs the kernels of
// the instruction set in use on several threads.
#include "temporal_block/temporal_block.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "common/dtype_info.h"
#include "common/threading.h"

namespace ca3d {
namespace {

constexpr int64_t kTaps = 3;
// Frames (of all pixels of a task together) whose matrices stay in the first two caches beside the
// weights of a head.
constexpr int64_t kBlockRows = 32;
constexpr std::size_t kAlignment = 64;

const TemporalBlockKernels& kernels() {
  switch (current_isa()) {
#ifdef CA3D_HAVE_avx512
    case Isa::kAvx512:
      return avx512::temporal_block_kernels;
#endif
#ifdef CA3D_HAVE_avx2
    case Isa::kAvx2:
      return avx2::temporal_block_kernels;
#endif
#ifdef CA3D_HAVE_neon
    case Isa::kNeon:
      return neon::temporal_block_kernels;
#endif
    default:
      return baseline::temporal_block_kernels;
  }
}

void check(const TemporalBlockProblem& problem, int threads) {
  check(problem.attention);
  if (problem.attention.dtype == DType::kFloat64) {
    throw std::invalid_argument(
        "dtype 'float64' is not supported; allowed: float32, float16, bfloat16");
  }
  if (problem.convolutions < 0 || problem.convolutions % 2 != 0) {
    throw std::invalid_argument("convolutions must be an even number of at least 0, got " +
                                std::to_string(problem.convolutions));
  }
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::unique_ptr<char, Free> allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(static_cast<char*>(memory));
}

// The tables of a call, and the memory behind them.
class Plan {
 public:
  Plan(const TemporalBlockProblem& problem, const TemporalBlockWeights& weights,
       const TemporalBlockClip& x, const TemporalBlockClip& out, const TemporalBlockKernels& isa)
      : isa_(isa) {
    const LocalAttentionProblem& p = problem.attention;
    const bool table = p.key_table != nullptr;
    tables.dtype = p.dtype;
    tables.inner = p.inner;
    tables.heads = p.heads;
    tables.frames = p.frames;
    tables.head_dim = p.head_dim;
    tables.padded_dim =
        (p.head_dim + kTemporalBlockPadding - 1) / kTemporalBlockPadding * kTemporalBlockPadding;
    tables.convolutions = problem.convolutions;
    tables.x = x;
    tables.out = out;
    tables.scale = static_cast<float>(p.scale);
    tables.pixels = p.outer * p.inner;
    tables.block_pixels = std::min(std::max(kBlockRows / p.frames, int64_t{1}), tables.pixels);
    tables.blocks = (tables.pixels + tables.block_pixels - 1) / tables.block_pixels;
    tables.group_heads = table ? p.heads : 1;
    read_weights(p, problem.convolutions, weights);
    if (table) {
      read_key_table(p);
    } else {
      read_window(p);
    }
    tables.visible = visible_.data();
    tables.zeros = zeros_.data();
    tables.key_row = key_row_.data();
  }

  int64_t tasks() const { return tables.blocks * (tables.heads / tables.group_heads); }

  TemporalBlockTables tables{};

 private:
  // `steps` times `heads` times `rows` rows; each is `pieces` times head_dim elements. Rows come in
  // sets of head_dim, of which each gets rows of zeros behind it, if `padded_rows`.
  TemporalBlockMatrix read(const void* from, int64_t steps, int64_t rows, int64_t pieces,
                           bool padded_rows = false) {
    const int64_t dim = tables.head_dim, padded = tables.padded_dim, heads = tables.heads;
    const int64_t row = pieces * padded;
    if (tables.dtype == DType::kFloat32 && dim == padded) {
      return {static_cast<const float*>(from), rows * row, heads * rows * row};
    }
    const int64_t set = padded_rows ? dim : rows, sets = steps * heads * (rows / set);
    const int64_t padded_set = padded_rows ? padded : rows;
    const int64_t all_rows = rows / set * padded_set;
    memory_.emplace_back(static_cast<std::size_t>(sets * padded_set * row));
    float* to = memory_.back().data();
    const char* source = static_cast<const char*>(from);
    for (int64_t i = 0; i < sets; ++i) {
      isa_.widen(tables.dtype, source + i * set * pieces * dim * stored_bytes(tables.dtype),
                 set * pieces, dim, padded, to + i * padded_set * row);
    }
    return {to, all_rows * row, heads * all_rows * row};
  }

  void read_weights(const LocalAttentionProblem& p, int64_t convolutions,
                    const TemporalBlockWeights& w) {
    memory_.reserve(8);
    tables.qkv_weight = read(w.qkv_weight, 1, p.head_dim, 3);
    tables.qkv_bias = read(w.qkv_bias, 1, p.frames, 3);
    tables.norm_scale = read(w.norm_scale, 1, 1, 1);
    tables.norm_shift = read(w.norm_shift, 1, p.frames, 1);
    if (convolutions == 0) return;
    tables.column_weight = read(w.column_weight, convolutions, kTaps * p.head_dim, 1, true);
    tables.column_bias = read(w.column_bias, convolutions, 1, 1);
    tables.column_scale = read(w.column_scale, convolutions, 1, 1);
    tables.column_shift = read(w.column_shift, convolutions, 1, 1);
  }

  void start_entry(int64_t visible, int64_t zeros) {
    visible_.push_back(static_cast<float>(visible));
    zeros_.push_back(static_cast<float>(zeros));
  }

  void read_window(const LocalAttentionProblem& p) {
    const Window& window = p.window;
    tables.slots = 0;
    for (int64_t t = 0; t < p.frames; ++t) {
      const int64_t count = visible_frames(window, p.frames, t).count;
      tables.slots = std::max(tables.slots, count);
      start_entry(count, window.edge == Edge::kZero ? window.kernel_size - count : 0);
    }
    for (int64_t t = 0; t < p.frames; ++t) {
      const VisibleFrames seen = visible_frames(window, p.frames, t);
      for (int64_t j = 0; j < tables.slots; ++j) {
        key_row_.push_back(j < seen.count ? seen.first + j * window.dilation : t);
      }
    }
  }

  void read_key_table(const LocalAttentionProblem& p) {
    const int64_t size = p.window.kernel_size;
    tables.slots = size;
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t t = 0; t < p.frames; ++t) {
        int64_t seen = 0;
        for (int64_t slot = 0; slot < size; ++slot) {
          const int64_t* source = p.key_table + (head * size + slot) * 2;
          const int64_t frame = t + source[1] - size / 2;
          if (frame < 0 || frame >= p.frames) continue;
          key_row_.push_back(source[0] * p.frames + frame);
          ++seen;
        }
        key_row_.resize(key_row_.size() + static_cast<std::size_t>(size - seen), t);
        start_entry(seen, size - seen);
      }
    }
  }

  const TemporalBlockKernels& isa_;
  std::vector<std::vector<float>> memory_;
  std::vector<float> visible_, zeros_;
  std::vector<int64_t> key_row_;
};

}  // namespace

void temporal_block(const TemporalBlockProblem& problem, const TemporalBlockWeights& weights,
                    const TemporalBlockClip& x, const TemporalBlockClip& out, int threads) {
  check(problem, threads);
  if (problem.attention.outer == 0 || problem.attention.inner == 0) return;
  const TemporalBlockKernels& isa = kernels();
  const Plan plan(problem, weights, x, out, isa);
  threads = static_cast<int>(std::min<int64_t>(threads, plan.tasks()));
  const std::size_t bytes = isa.scratch_bytes(plan.tables);
  const std::unique_ptr<char, Free> scratch = allocate(bytes * static_cast<std::size_t>(threads));
  parallel_ranges(plan.tasks(), threads, [&](int thread, int64_t begin, int64_t end) {
    isa.run(plan.tables, begin, end, scratch.get() + bytes * static_cast<std::size_t>(thread));
  });
}

}  // namespace ca3d
