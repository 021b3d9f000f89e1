#include "local_attention/cuda_plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "common/dtype_info.h"
#include "common/unsupported.h"

namespace ca3d {
namespace {

// What a block may use without asking, on every GPU.
constexpr size_t kSharedBytes = 48 * 1024;
// Above this a multiprocessor of the smaller GPUs holds too few blocks of 128 threads: they get
// 256.
constexpr size_t kLargeShared = 12 * 1024;
// Most positions of a tile where a whole sequence doesn't fit.
constexpr int64_t kLongestTile = 128;

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

void limit(const char* name, int64_t value, int64_t most) {
  if (value <= most) return;
  throw Unsupported(std::string(name) + " " + std::to_string(value) + " is above " +
                    std::to_string(most));
}

// Whether every row begins at a multiple of 16 bytes. The stride of a single element is arbitrary.
bool is_aligned(const StridedRows& rows, const LocalAttentionProblem& p, int bytes) {
  const auto steps = [&](int64_t size, int64_t stride) {
    return size == 1 || stride * bytes % 16 == 0;
  };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && steps(p.outer, rows.outer) &&
         steps(p.inner, rows.inner) && steps(p.heads, rows.head) && steps(p.frames, rows.frame);
}

KeyTable make_table(const LocalAttentionProblem& p) {
  KeyTable table{};
  const int64_t size = p.window.kernel_size;
  limit("heads * kernel_size of a key_table,", p.heads * size, KeyTable::kMaxEntries);
  int count = 0;
  for (int64_t g = 0; g < p.heads; ++g) {
    for (int64_t i = 0; i < p.heads * size; ++i) {
      const int64_t head = p.key_table[2 * i];
      const auto slot = static_cast<uint8_t>(p.key_table[2 * i + 1]);
      if (head != g) continue;
      table.source[i] = {static_cast<uint8_t>(g), slot};
      table.readers[count++] = {static_cast<uint8_t>(i / size), static_cast<uint8_t>(i % size),
                                slot};
    }
    table.reader_begin[g + 1] = static_cast<uint16_t>(count);
  }
  return table;
}

class Planner {
 public:
  Planner(const LocalAttentionProblem& problem, bool backward,
          std::initializer_list<StridedRows> tensors)
      : p_(problem), bytes_(stored_bytes(problem.dtype)) {
    launch_.backward = backward;
    launch_.dtype = problem.dtype;
    aligned_ = p_.head_dim * bytes_ % 16 == 0;
    for (const StridedRows& rows : tensors) aligned_ = aligned_ && is_aligned(rows, p_, bytes_);
    limit("head_dim", p_.head_dim, kMaxGpuHeadDim);
    limit("T", p_.frames, kMaxInt);
    set_problem();
  }

  // Tries the ways of access, best first.
  LocalAttentionLaunch decide() {
    int64_t staged_tile = 0;
    for (const Access access : {Access::kStaged, Access::kVectors, Access::kScalars}) {
      if ((access == Access::kScalars) == aligned_) continue;
      if (!try_access(access)) continue;
      if (access == Access::kStaged && mostly_halo()) {
        staged_tile = args().tile;
        continue;
      }
      if (args().tile > staged_tile) {
        set_grid();
        return launch_;
      }
    }
    if (staged_tile > 0 && try_access(Access::kStaged)) {
      set_grid();
      return launch_;
    }
    throw Unsupported("a window of " + std::to_string(args().slots) + " frames of " +
                      dtype_name(p_.dtype) + " needs more than " + std::to_string(kSharedBytes) +
                      " bytes of shared memory");
  }

 private:
  LocalAttentionArguments& args() { return launch_.arguments; }
  bool staged() const { return launch_.access == Access::kStaged; }

  bool try_access(Access access) {
    launch_.access = access;
    set_lanes();
    return set_tile();
  }

  // Whether a block computes more probabilities for its keys' other queries than for its own.
  bool mostly_halo() {
    const int64_t tile = args().tile;
    return launch_.backward && tile < longest_ && rows_around(tile) > 2 * tile;
  }

  void set_problem() {
    LocalAttentionArguments& a = args();
    const int64_t phases = std::min(p_.window.dilation, p_.frames);
    longest_ = (p_.frames - 1) / p_.window.dilation + 1;
    a.scale = p_.scale;
    a.window = p_.window;
    a.window.dilation = 1;
    a.dilation = p_.window.dilation;
    a.longest = static_cast<int32_t>(longest_);
    a.full_phases = static_cast<int32_t>(p_.frames - (longest_ - 1) * p_.window.dilation);
    a.head_dim = static_cast<int32_t>(p_.head_dim);
    a.has_table = p_.key_table != nullptr;
    if (a.has_table) a.table = make_table(p_);
    a.slots = static_cast<int32_t>(a.has_table ? p_.window.kernel_size
                                               : std::min(p_.window.kernel_size, longest_));
    // In floating point, where the product of the sizes can't overflow.
    const double units = static_cast<double>(p_.outer) * static_cast<double>(p_.inner) *
                         static_cast<double>(phases) * static_cast<double>(p_.heads);
    if (units > static_cast<double>(kMaxInt)) {
      throw Unsupported("more than " + std::to_string(kMaxInt) + " sequences");
    }
    a.units = static_cast<int32_t>(p_.outer * p_.inner * phases * p_.heads);
    a.heads = make_divider(p_.heads);
    a.phases = make_divider(phases);
    a.inner = make_divider(p_.inner);
  }

  void set_lanes() {
    const int64_t width = launch_.access == Access::kScalars ? 1 : 16 / bytes_;
    const int64_t accesses = (p_.head_dim + width - 1) / width;
    int32_t shift = 0;
    while ((1 << shift) < accesses && (1 << shift) < kWarpLanes) ++shift;
    args().lanes = 1 << shift;
    args().lane_shift = shift;
  }

  // Positions that a block needs for a tile, beyond the tile itself: windows reach kernel_size - 1
  // positions, twice that where they are shifted inwards.
  int64_t rows_around(int64_t positions) const {
    const Window& window = p_.window;
    const int64_t reach = std::min(window.kernel_size - 1, longest_);
    const bool shifts = window.edge == Edge::kShift && !window.causal;
    return std::min(longest_, positions + (shifts ? 2 : 1) * reach);
  }

  size_t shared_bytes(int64_t tile) {
    LocalAttentionArguments& a = args();
    const bool whole = tile == longest_;
    const int64_t queries = launch_.backward && !whole ? rows_around(tile) : tile;
    a.tile = static_cast<int32_t>(tile);
    a.query_rows = make_divider(queries);
    a.key_rows = make_divider(whole ? tile : rows_around(queries));
    a.tiles = make_divider((longest_ + tile - 1) / tile);
    if (!staged() && !launch_.backward) return 0;
    // Guards the 32-bit sums of shared_layout.
    const double rows = 2.0 * a.units_per_block * (a.key_rows.divisor + a.query_rows.divisor);
    if (rows * (p_.head_dim + a.slots) * 8 > static_cast<double>(kMaxInt)) return kMaxInt;
    return static_cast<size_t>(shared_layout(a, staged(), launch_.backward, bytes_).end);
  }

  // The largest tile whose rows fit into shared memory; false if not even one position does.
  bool set_tile() {
    args().units_per_block = static_cast<int32_t>(args().has_table ? p_.heads : 1);
    const bool keeps_rows = staged() || launch_.backward;
    int64_t tile = keeps_rows ? longest_ : std::min(longest_, kLongestTile);
    if (shared_bytes(tile) > kSharedBytes) tile = std::min(tile - 1, kLongestTile);
    while (tile > 0 && shared_bytes(tile) > kSharedBytes) tile = tile > 8 ? tile - 8 : tile - 1;
    return tile > 0;
  }

  void set_grid() {
    LocalAttentionArguments& a = args();
    launch_.block = 128;
    if (shared_bytes(a.tile) > kLargeShared) launch_.block = kMaxBlockThreads;
    const int64_t teams = launch_.block / a.lanes;
    if (!a.has_table && a.tiles.divisor == 1) {
      const int64_t room = static_cast<int64_t>(kLargeShared / (shared_bytes(a.tile) + 1));
      const int64_t wanted = std::min(teams / std::max<int64_t>(a.tile, 1), room);
      a.units_per_block = static_cast<int32_t>(std::max<int64_t>(wanted, 1));
    }
    launch_.shared = shared_bytes(a.tile);
    const int64_t blocks =
        (int64_t{a.units} + a.units_per_block - 1) / a.units_per_block * a.tiles.divisor;
    limit("the number of blocks,", blocks, kMaxInt);
    launch_.grid = static_cast<unsigned>(blocks);
  }

  const LocalAttentionProblem& p_;
  int bytes_;
  bool aligned_;
  int64_t longest_ = 0;  // positions of the longest sequence
  LocalAttentionLaunch launch_{};
};

}  // namespace

LocalAttentionLaunch plan_forward(const LocalAttentionProblem& problem, const StridedRows& q,
                                  const StridedRows& k, const StridedRows& v,
                                  const StridedRows& o) {
  LocalAttentionLaunch launch = Planner(problem, false, {q, k, v, o}).decide();
  LocalAttentionArguments& a = launch.arguments;
  a.q = q;
  a.k = k;
  a.v = v;
  a.o = o;
  return launch;
}

LocalAttentionLaunch plan_backward(const LocalAttentionProblem& problem, const StridedRows& q,
                                   const StridedRows& k, const StridedRows& v,
                                   const StridedRows& go, const StridedRows& dq,
                                   const StridedRows& dk, const StridedRows& dv) {
  LocalAttentionLaunch launch = Planner(problem, true, {q, k, v, go, dq, dk, dv}).decide();
  LocalAttentionArguments& a = launch.arguments;
  a.q = q;
  a.k = k;
  a.v = v;
  a.go = go;
  a.dq = dq;
  a.dk = dk;
  a.dv = dv;
  return launch;
}

std::string entry_name(const LocalAttentionLaunch& launch) {
  const char* access[] = {"staged", "vectors", "scalars"};
  return std::string("ca3d_local_attention_") + (launch.backward ? "backward_" : "forward_") +
         dtype_name(launch.dtype) + "_" + access[static_cast<int>(launch.access)];
}

}  // namespace ca3d
