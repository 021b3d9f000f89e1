// Checks a call, cuts it into tasks and runs the kernels of the instruction set in use.
#include "folded_conv/folded_conv.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/aligned.h"
#include "common/dispatch.h"
#include "common/dtype_info.h"
#include "common/threading.h"

namespace ca3d {
namespace {

constexpr int64_t kTileRows = 2, kTileColumns = 4;
// Tiles of a task: as many as the second cache holds, so that the filters, which may come from
// memory, are read seldom.
constexpr int64_t kMostTiles = 56;
// A team of threads costs more than it saves on fewer elements.
constexpr int64_t kWorthThreads = 32768;
constexpr int64_t kHugeSize = int64_t{1} << 40;

const FoldedConvKernels& kernels() {
  switch (current_isa()) {
#ifdef CA3D_HAVE_avx512
    case Isa::kAvx512:
      return avx512::folded_conv_kernels;
#endif
#ifdef CA3D_HAVE_avx2
    case Isa::kAvx2:
      return avx2::folded_conv_kernels;
#endif
#ifdef CA3D_HAVE_neon
    case Isa::kNeon:
      return neon::folded_conv_kernels;
#endif
    default:
      return baseline::folded_conv_kernels;
  }
}

void require(bool condition, const char* name, int64_t value, const char* allowed) {
  if (condition) return;
  throw std::invalid_argument(std::string(name) + " must be " + allowed + ", got " +
                              std::to_string(value));
}

void check_common(DType dtype, int threads) {
  if (dtype == DType::kFloat64) {
    throw std::invalid_argument(
        "dtype 'float64' is not supported; allowed: float32, float16, bfloat16");
  }
  require(threads >= 1, "threads", threads, "at least 1");
}

void check_size(const char* name, int64_t value) {
  require(value >= 1, name, value, "at least 1");
  require(value < kHugeSize, name, value, "less than 2**40");
}

void check_channels(const char* name, int64_t value) {
  check_size(name, value);
  require(value % kFoldedConvChannels == 0, name, value, "a multiple of 16");
}

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

const FoldedConvPanel& panel_for(const FoldedConvKernels& isa, int64_t outputs) {
  const auto padded = [&](const FoldedConvPanel& panel) {
    return divide_up(outputs, panel.columns) * panel.columns;
  };
  return padded(isa.wide) > padded(isa.narrow) ? isa.narrow : isa.wide;
}

// About how long a task takes; 1 is what one tile's products for all outputs of a group take.
double task_cost(int64_t tiles, int64_t parts, int64_t outputs, int64_t rows) {
  // Rows that don't fill the registers; each block of them takes at least the time of four.
  const int64_t rest = tiles % rows;
  const int64_t multiplied = tiles - rest + 4 * (rest / 4 + rest % 4 / 2 + rest % 2);
  // A panel can't come from memory in less time than that of 16 rows.
  const double product = static_cast<double>(std::max<int64_t>(multiplied, 16));
  // Inputs are combined for each part of the outputs anew.
  const double combined = 6.0 * static_cast<double>(tiles) / static_cast<double>(outputs);
  return product / static_cast<double>(parts) + combined;
}

// Cuts tiles into blocks and outputs into parts so that the busiest thread has the least to do.
void cut(FoldedConvTables& tables, const FoldedConvKernels& isa, int threads) {
  const FoldedConvProblem& problem = tables.problem;
  const FoldedConvPanel& panel = panel_for(isa, problem.outputs);
  tables.panel = panel.columns;
  tables.panels = divide_up(problem.outputs, panel.columns);
  const int64_t least = divide_up(tables.tiles, kMostTiles);
  const int64_t most = std::min(least + 2 * threads, tables.tiles);
  double best = 0;
  for (int64_t parts = 1; parts <= std::min<int64_t>(threads, tables.panels); ++parts) {
    for (int64_t blocks = least; blocks <= most; ++blocks) {
      const int64_t tiles = divide_up(tables.tiles, blocks);
      const int64_t tasks = divide_up(tables.tiles, tiles) * parts * problem.groups;
      const double cost = static_cast<double>(divide_up(tasks, threads)) *
                          task_cost(tiles, parts, problem.outputs, panel.rows);
      if (tables.parts == 0 || cost < best) {
        best = cost;
        tables.parts = parts;
        tables.task_tiles = tiles;
        tables.blocks = divide_up(tables.tiles, tiles);
      }
    }
  }
}

}  // namespace

int64_t folded_conv_panel(int64_t outputs) {
  check_channels("outputs", outputs);
  return panel_for(kernels(), outputs).columns;
}

void folded_conv(const FoldedConvProblem& problem, const float* filters,
                 const FoldedConvAffine& affine, const void* x, const void* residual, void* z,
                 int threads) {
  check_common(problem.dtype, threads);
  check_size("images", problem.images);
  check_size("height", problem.height);
  check_size("width", problem.width);
  check_size("groups", problem.groups);
  check_channels("inputs", problem.inputs);
  check_channels("outputs", problem.outputs);
  FoldedConvTables tables{};
  tables.problem = problem;
  tables.filters = filters;
  tables.affine = affine;
  tables.x = x;
  tables.residual = residual;
  tables.z = z;
  tables.tile_rows = divide_up(problem.height, kTileRows);
  tables.tile_columns = divide_up(problem.width, kTileColumns);
  tables.tiles = problem.images * tables.tile_rows * tables.tile_columns;
  const FoldedConvKernels& isa = kernels();
  cut(tables, isa, threads);
  const int64_t tasks = problem.groups * tables.parts * tables.blocks;
  const int64_t team = std::min<int64_t>(threads, tasks);
  const std::size_t bytes = isa.scratch_bytes(tables);
  const AlignedMemory scratch = allocate_aligned(bytes * static_cast<std::size_t>(team));
  parallel_ranges(tasks, static_cast<int>(team), [&](int thread, int64_t begin, int64_t end) {
    isa.run(tables, begin, end, scratch.get() + bytes * static_cast<std::size_t>(thread));
  });
}

void folded_epilogue(DType dtype, int64_t rows, int64_t channels, const FoldedConvAffine& affine,
                     const void* y, const void* residual, void* z, int threads) {
  check_common(dtype, threads);
  check_size("rows", rows);
  check_size("channels", channels);
  const int64_t row = channels * stored_bytes(dtype);
  const FoldedConvKernels& isa = kernels();
  const auto at = [&](auto* data, int64_t begin) {
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(data)>>,
                                    const char, char>;
    return data ? static_cast<Byte*>(data) + begin * row : nullptr;
  };
  const int team = rows * channels < kWorthThreads ? 1 : threads;
  parallel_ranges(rows, team, [&](int, int64_t begin, int64_t end) {
    isa.epilogue(dtype, end - begin, channels, affine, at(y, begin), at(residual, begin),
                 at(z, begin));
  });
}

}  // namespace ca3d
