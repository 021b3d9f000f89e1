// Checks a call, cuts it into tasks and runs the kernels of the instruction set in use.
#include "folded_conv/folded_conv.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dispatch.h"
#include "common/dtype_info.h"
#include "common/threading.h"

namespace ca3d {
namespace {

constexpr int64_t kTileRows = 2, kTileColumns = 4;
// Tiles of a task: enough that the filters, which may come from the third cache, are read seldom. A
// multiple of the rows of a block in registers.
constexpr int64_t kTaskTiles = 48;
constexpr int64_t kTasksOfThread = 4;
constexpr int64_t kRegisterRows = 12;
// A team of threads costs more than it saves on fewer elements.
constexpr int64_t kWorthThreads = 32768;
constexpr int64_t kHugeSize = int64_t{1} << 40;
constexpr std::size_t kAlignment = 64;

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

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

std::unique_ptr<char, Free> allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<char, Free>(static_cast<char*>(memory));
}

// Smaller tasks where there are few tiles for the threads.
int64_t task_tiles(int64_t tiles, int64_t groups, int threads) {
  const int64_t share = tiles * groups / (threads == 1 ? 1 : threads * kTasksOfThread);
  const int64_t rounded = (share + kRegisterRows - 1) / kRegisterRows * kRegisterRows;
  return std::min(std::max(rounded, kRegisterRows), kTaskTiles);
}

}  // namespace

int64_t folded_conv_panel() {
  return kernels().panel;
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
  tables.tile_rows = (problem.height + kTileRows - 1) / kTileRows;
  tables.tile_columns = (problem.width + kTileColumns - 1) / kTileColumns;
  tables.tiles = problem.images * tables.tile_rows * tables.tile_columns;
  tables.task_tiles = task_tiles(tables.tiles, problem.groups, threads);
  tables.blocks = (tables.tiles + tables.task_tiles - 1) / tables.task_tiles;
  const int64_t tasks = tables.blocks * problem.groups;
  const FoldedConvKernels& isa = kernels();
  const int64_t team = std::min<int64_t>(threads, tasks);
  const std::size_t bytes = isa.scratch_bytes(tables);
  const std::unique_ptr<char, Free> scratch = allocate(bytes * static_cast<std::size_t>(team));
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
