// Checks a call, brings its weights into the form that the kernels read, and runs the kernels of
// the instruction set in use on several threads.
#include "temporal_block/temporal_block.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/aligned.h"
#include "common/dispatch.h"
#include "common/dtype_info.h"
#include "common/threading.h"

namespace ca3d {
namespace {

constexpr int64_t kTaps = 3;
constexpr int64_t kTileFrames = 4;
// Frames of all pixels of a task together, about: their combinations and one matrix of a filter
// then stay in the first cache, and all filters of a head in the second.
constexpr int64_t kBlockRows = 72;

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

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t padded_dim(const TemporalBlockProblem& problem) {
  const int64_t dim = problem.attention.head_dim;
  return divide_up(dim, kTemporalBlockPadding) * kTemporalBlockPadding;
}

// Matrices of a filter: a tile of four frames is worth it from three on.
int64_t points(const TemporalBlockProblem& problem) {
  return problem.attention.frames < 3 ? kTaps : kTemporalBlockPoints;
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
    tables.padded_dim = padded_dim(problem);
    tables.points = points(problem);
    tables.tiles = divide_up(p.frames, kTileFrames);
    tables.padded_frames =
        (tables.points == kTaps ? p.frames : tables.tiles * kTileFrames) + kTaps - 1;
    tables.convolutions = problem.convolutions;
    tables.x = x;
    tables.out = out;
    tables.scale = static_cast<float>(p.scale);
    tables.pixels = p.outer * p.inner;
    // Blocks of nearly the same number of pixels, whose rows of matrices fill the registers unless
    // that makes blocks of more than twice the rows.
    const int64_t rows = tables.points == kTaps ? p.frames : tables.tiles;
    const int64_t most = std::max(kBlockRows / p.frames, int64_t{1});
    const int64_t unit = std::min(isa.register_rows / std::gcd(rows, isa.register_rows), most);
    const int64_t least_blocks = divide_up(tables.pixels, most);
    tables.block_pixels = divide_up(divide_up(tables.pixels, least_blocks), unit) * unit;
    tables.blocks = divide_up(tables.pixels, tables.block_pixels);
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
  // `steps` times `heads` times `rows` rows, each of `pieces` times head_dim elements.
  TemporalBlockMatrix read(const void* from, int64_t steps, int64_t rows, int64_t pieces) {
    const int64_t row = pieces * tables.padded_dim, all_rows = steps * tables.heads * rows;
    const float* data = static_cast<const float*>(from);
    if (tables.dtype != DType::kFloat32 || tables.head_dim != tables.padded_dim) {
      memory_.emplace_back(static_cast<std::size_t>(all_rows * row));
      isa_.widen(tables.dtype, from, all_rows * pieces, tables.head_dim, tables.padded_dim,
                 memory_.back().data());
      data = memory_.back().data();
    }
    return {data, rows * row, tables.heads * rows * row};
  }

  void read_weights(const LocalAttentionProblem& p, int64_t convolutions,
                    const TemporalBlockWeights& w) {
    memory_.reserve(8);
    tables.qkv_weight = read(w.qkv_weight, 1, p.head_dim, 3);
    tables.qkv_bias = read(w.qkv_bias, 1, p.frames, 3);
    tables.norm_scale = read(w.norm_scale, 1, 1, 1);
    tables.norm_shift = read(w.norm_shift, 1, p.frames, 1);
    if (convolutions == 0) return;
    const int64_t filter = tables.points * tables.padded_dim * tables.padded_dim;
    tables.filters = {w.filters, filter, p.heads * filter};
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

int64_t temporal_block_filter_count(const TemporalBlockProblem& problem) {
  check(problem, 1);
  const int64_t dim = padded_dim(problem);
  return problem.convolutions * problem.attention.heads * points(problem) * dim * dim;
}

void temporal_block_filters(const TemporalBlockProblem& problem, const void* column_weight,
                            float* filters, int threads) {
  check(problem, threads);
  const TemporalBlockKernels& isa = kernels();
  const LocalAttentionProblem& p = problem.attention;
  const int64_t dim = padded_dim(problem), matrix = dim * dim;
  const int64_t bytes = kTaps * p.head_dim * p.head_dim * stored_bytes(p.dtype);
  const int64_t filter = points(problem) * matrix;
  std::vector<float> scratch(static_cast<std::size_t>(kTaps * matrix * threads));
  parallel_ranges(problem.convolutions * p.heads, threads,
                  [&](int thread, int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) {
                      isa.filters(p.dtype, static_cast<const char*>(column_weight) + i * bytes,
                                  p.head_dim, dim, points(problem),
                                  scratch.data() + kTaps * matrix * thread, filters + i * filter);
                    }
                  });
}

void temporal_block(const TemporalBlockProblem& problem, const TemporalBlockWeights& weights,
                    const TemporalBlockClip& x, const TemporalBlockClip& out, int threads) {
  check(problem, threads);
  if (problem.attention.outer == 0 || problem.attention.inner == 0) return;
  const TemporalBlockKernels& isa = kernels();
  const Plan plan(problem, weights, x, out, isa);
  threads = static_cast<int>(std::min<int64_t>(threads, plan.tasks()));
  const std::size_t bytes = isa.scratch_bytes(plan.tables);
  const AlignedMemory scratch = allocate_aligned(bytes * static_cast<std::size_t>(threads));
  parallel_ranges(plan.tasks(), threads, [&](int thread, int64_t begin, int64_t end) {
    isa.run(plan.tables, begin, end, scratch.get() + bytes * static_cast<std::size_t>(thread));
  });
}

}  // namespace ca3d
