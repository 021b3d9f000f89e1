// What the threads of a block know and do together, for the CUDA kernels of local attention: which
// rows are whose, where they lie, and dot products and sums over them.
#pragma once

#include "common/cuda.h"
#include "common/elements.cuh"
#include "local_attention/cuda_plan.h"

namespace ca3d {
namespace {

// Slots whose scores are computed together: loads in flight, and one step of the running softmax.
constexpr int kSlotBlock = 5;

template <class Real>
__device__ __forceinline__ Real minus_infinity() {
  return -static_cast<Real>(__builtin_huge_val());
}

__device__ __forceinline__ float exponential(float x) {
  return expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// ---- places ----

// One sequence of one head: `frames` positions, of which position i is frame phase + i * dilation.
struct Unit {
  int64_t outer, inner;
  int32_t head, phase, frames;
};

// Consecutive positions.
struct Span {
  int32_t first, count;
};

// Row `position` of a unit. Without a row (`exists` false) memory may not be reached by it: its
// unit and position are 0 or lie beyond the unit's frames.
struct Row {
  Unit unit;
  int32_t number;  // of the unit in the block
  int32_t position;
  bool exists;
};

__device__ __forceinline__ Unit locate_unit(const LocalAttentionArguments& a, uint32_t index) {
  const uint32_t head = index % a.heads, sequence = index / a.heads;
  const uint32_t place = sequence / a.phases;
  const int32_t phase = static_cast<int32_t>(sequence % a.phases);
  return {static_cast<int64_t>(place / a.inner), static_cast<int64_t>(place % a.inner),
          static_cast<int32_t>(head), phase, a.longest - (phase >= a.full_phases)};
}

// The window as visible_frames wants it: here the compiler sees that there is no dilation left, and
// drops the divisions.
__device__ __forceinline__ Window window_of(const LocalAttentionArguments& a) {
  return {a.window.kernel_size, 1, a.window.causal, a.window.edge};
}

// The positions that a query sees; with a key table those that some slot may see.
__device__ __forceinline__ Span keys_of(const LocalAttentionArguments& a, int32_t frames,
                                        int32_t position) {
  const VisibleFrames seen = visible_frames(window_of(a), frames, position);
  return {static_cast<int32_t>(seen.first), static_cast<int32_t>(seen.count)};
}

__device__ __forceinline__ Span queries_of(const LocalAttentionArguments& a, int32_t frames,
                                           int32_t position) {
  const VisibleFrames seen = querying_frames(window_of(a), frames, position);
  return {static_cast<int32_t>(seen.first), static_cast<int32_t>(seen.count)};
}

// What a block does with a unit of `frames` positions: it writes the results of `tile`, for which
// it needs the scores of `queries` and the rows of `keys`.
struct Spans {
  Span tile, queries, keys;
};

// From the span of the first row's answer to the end of the last row's.
template <class Answer>
__device__ __forceinline__ Span hull(Span rows, Answer answer) {
  const Span first = answer(rows.first), last = answer(rows.first + rows.count - 1);
  return {first.first, last.first + last.count - first.first};
}

template <bool kBackward>
__device__ __forceinline__ Spans spans_of(const LocalAttentionArguments& a, int32_t frames,
                                          uint32_t tile_number) {
  const Span whole = {0, frames};
  if (a.tiles.divisor == 1) return {whole, whole, whole};
  const int32_t first = static_cast<int32_t>(tile_number) * a.tile;
  if (first >= frames) return {{first, 0}, {first, 0}, {first, 0}};
  Spans spans;
  spans.tile = {first, min(a.tile, frames - first)};
  spans.queries = spans.tile;
  if (kBackward) {
    spans.queries = hull(spans.tile, [&](int32_t s) { return queries_of(a, frames, s); });
  }
  spans.keys = hull(spans.queries, [&](int32_t t) { return keys_of(a, frames, t); });
  return spans;
}

// ---- what a thread knows ----

template <class Stored, Access kAccess>
struct Fragment {
  using Real = Computed<Stored>;
  static constexpr int kWidth = kAccess == Access::kScalars ? 1 : kVectorWidth<Stored>;
  static constexpr int kElementsOfAWarp = kWidth * kWarpLanes;
  static constexpr int kChunks =
      kElementsOfAWarp >= kMaxGpuHeadDim ? 1 : static_cast<int>(kMaxGpuHeadDim) / kElementsOfAWarp;

  // Chunk c of a lane are the elements (c * lanes + lane) * kWidth and following of a row.
  Real x[kChunks][kWidth];
};

template <class Stored, Access kAccess, bool kBackward>
class Block {
 public:
  using Real = Computed<Stored>;
  using Part = Fragment<Stored, kAccess>;
  static constexpr bool kStaged = kAccess == Access::kStaged;

  __device__ Block(const LocalAttentionArguments& arguments, unsigned char* shared)
      : a(arguments),
        lane(threadIdx.x & (arguments.lanes - 1)),
        team(threadIdx.x >> arguments.lane_shift),
        teams(blockDim.x >> arguments.lane_shift),
        tile_number(blockIdx.x % arguments.tiles),
        first_unit(blockIdx.x / arguments.tiles * arguments.units_per_block),
        shared_(shared),
        layout_(shared_layout(arguments, kStaged, kBackward, sizeof(Stored))) {}

  const LocalAttentionArguments& a;
  const int lane, team, teams;
  const uint32_t tile_number, first_unit;

  // Number of rows that units with room for `capacity` rows have together.
  __device__ int rows(Divider capacity) const {
    return a.units_per_block * static_cast<int>(capacity.divisor);
  }

  // Row `index` of the block, where every unit has room for `capacity` rows of its `span`.
  __device__ Row row(int index, Divider capacity, Span Spans::* span) const {
    const uint32_t number = index / capacity, offset = index % capacity;
    Row found{};
    if (index >= rows(capacity) || first_unit + number >= static_cast<uint32_t>(a.units)) {
      return found;
    }
    found.number = static_cast<int32_t>(number);
    found.unit = locate_unit(a, first_unit + number);
    const Span positions = spans_of<kBackward>(a, found.unit.frames, tile_number).*span;
    found.position = positions.first + static_cast<int32_t>(offset);
    found.exists = static_cast<int32_t>(offset) < positions.count;
    return found;
  }

  // Address of a position of a head in a tensor.
  __device__ Stored* at(const StridedRows& tensor, const Unit& unit, int head, int position) const {
    const int64_t frame = unit.phase + position * a.dilation;
    return static_cast<Stored*>(tensor.data) + unit.outer * tensor.outer +
           unit.inner * tensor.inner + head * tensor.head + frame * tensor.frame;
  }

  // Copies the rows of two tensors that the units of the block need to shared memory.
  __device__ void stage(const StridedRows& x, int x_at, const StridedRows& y, int y_at,
                        Divider capacity, Span Spans::* span) const {
    const int count = rows(capacity);
    for (int index = team; index < count; index += teams) {
      const Row from = row(index, capacity, span);
      if (!from.exists) continue;
      const Stored* x_row = at(x, from.unit, from.unit.head, from.position);
      const Stored* y_row = at(y, from.unit, from.unit.head, from.position);
      const int64_t offset = static_cast<int64_t>(index) * a.head_dim;
      Stored* x_to = reinterpret_cast<Stored*>(shared_ + x_at) + offset;
      Stored* y_to = reinterpret_cast<Stored*>(shared_ + y_at) + offset;
#pragma unroll
      for (int c = 0; c < Part::kChunks; ++c) {
        const int i = (c * a.lanes + lane) * Part::kWidth;
        if (i >= a.head_dim) continue;
        const uint4 x_bytes = *reinterpret_cast<const uint4*>(x_row + i);
        const uint4 y_bytes = *reinterpret_cast<const uint4*>(y_row + i);
        *reinterpret_cast<uint4*>(x_to + i) = x_bytes;
        *reinterpret_cast<uint4*>(y_to + i) = y_bytes;
      }
    }
  }

  __device__ void stage_keys() const {
    stage(a.k, layout_.k, a.v, layout_.v, a.key_rows, &Spans::keys);
  }
  __device__ void stage_queries() const {
    stage(a.q, layout_.q, a.go, layout_.go, a.query_rows, &Spans::queries);
  }

  // The row that a query of `unit` meets at a position of a head: of k, v, q or go.
  struct Source {
    const Stored* data;
    int64_t head, position;
    __device__ const Stored* at(int h, int32_t s) const { return data + h * head + s * position; }
  };

  // Heads count from the unit's own, so that only a key table needs them.
  __device__ Source source(const StridedRows& tensor, int shared_at, const Row& of,
                           Divider capacity, int32_t first) const {
    if (!kStaged) {
      return {at(tensor, of.unit, of.unit.head, 0), tensor.head, tensor.frame * a.dilation};
    }
    const int64_t room = static_cast<int64_t>(capacity.divisor) * a.head_dim;
    const Stored* rows = reinterpret_cast<const Stored*>(shared_ + shared_at);
    return {rows + of.number * room - static_cast<int64_t>(first) * a.head_dim, room, a.head_dim};
  }

  __device__ void load_part(const Stored* from, Part* to) const {
#pragma unroll
    for (int c = 0; c < Part::kChunks; ++c) {
      const int i = (c * a.lanes + lane) * Part::kWidth;
      if (i < a.head_dim) {
        load<Part::kWidth>(from + i, to->x[c]);
      } else {
#pragma unroll
        for (int j = 0; j < Part::kWidth; ++j) to->x[c][j] = 0;
      }
    }
  }

  __device__ void store_part(const Part& from, Stored* to) const {
#pragma unroll
    for (int c = 0; c < Part::kChunks; ++c) {
      const int i = (c * a.lanes + lane) * Part::kWidth;
      if (i < a.head_dim) store<Part::kWidth>(to + i, from.x[c]);
    }
  }

  // This lane's share of the dot product of two rows.
  __device__ Real partial_dot(const Part& x, const Stored* row) const {
    Part y;
    load_part(row, &y);
    Real sum = 0;
#pragma unroll
    for (int c = 0; c < Part::kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < Part::kWidth; ++j) sum += x.x[c][j] * y.x[c][j];
    }
    return sum;
  }

  __device__ void add_row(Real weight, const Stored* row, Part* sum) const {
    Part y;
    load_part(row, &y);
#pragma unroll
    for (int c = 0; c < Part::kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < Part::kWidth; ++j) sum->x[c][j] += weight * y.x[c][j];
    }
  }

  // Sums over the team; every lane gets the same bits, because each step adds the same two numbers
  // in both of its lanes.
  template <int kCount>
  __device__ void team_sums(Real* x) const {
    for (int step = a.lanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kWholeWarp, x[i], step);
    }
  }

  __device__ Real team_sum(Real x) const {
    team_sums<1>(&x);
    return x;
  }

  // ---- windows ----

  // The rows that a query meets: its own window, or with a key table what each slot names.
  struct Keys {
    Span own;
    int32_t head, position, frames;
    bool exists;
  };

  __device__ Keys keys(const Row& query) const {
    Keys seen{};
    seen.exists = query.exists;
    seen.head = query.unit.head;
    seen.position = query.position;
    seen.frames = query.unit.frames;
    if (query.exists) seen.own = keys_of(a, seen.frames, seen.position);
    return seen;
  }

  // Where slot n of a query lies: head relative to the query's own, and position.
  struct Key {
    int32_t head, position;
    bool exists;
  };

  __device__ Key key(const Keys& seen, int n) const {
    if (!a.has_table) return {0, seen.own.first + n, seen.exists && n < seen.own.count};
    if (!seen.exists || n >= a.slots) return {0, 0, false};
    const KeyTable::Source from = a.table.source[seen.head * a.slots + n];
    const int32_t position = seen.position + from.slot - a.slots / 2;
    return {from.head - seen.head, position, position >= 0 && position < seen.frames};
  }

  // Slots of a query that lie outside the clip but take part in its softmax.
  __device__ Real zero_slots(const Keys& seen) const {
    if (a.window.edge != Edge::kZero || !seen.exists) return 0;
    if (!a.has_table) return static_cast<Real>(a.window.kernel_size - seen.own.count);
    int count = 0;
    for (int n = 0; n < a.slots; ++n) count += !key(seen, n).exists;
    return static_cast<Real>(count);
  }

  // ---- the backward pass's scores ----

  __device__ Real* scores(int row) const {
    return reinterpret_cast<Real*>(shared_ + layout_.scores) + row * a.slots;
  }
  __device__ Real* gradients(int row) const {
    return reinterpret_cast<Real*>(shared_ + layout_.gradients) + row * a.slots;
  }
  // Position of slot 0 of each query.
  __device__ int32_t* first_positions() const {
    return reinterpret_cast<int32_t*>(shared_ + layout_.first);
  }

  __device__ Source key_rows(const Row& of, const Spans& spans) const {
    return source(a.k, layout_.k, of, a.key_rows, spans.keys.first);
  }
  __device__ Source value_rows(const Row& of, const Spans& spans) const {
    return source(a.v, layout_.v, of, a.key_rows, spans.keys.first);
  }
  __device__ Source query_rows(const Row& of, const Spans& spans) const {
    return source(a.q, layout_.q, of, a.query_rows, spans.queries.first);
  }
  __device__ Source gradient_rows(const Row& of, const Spans& spans) const {
    return source(a.go, layout_.go, of, a.query_rows, spans.queries.first);
  }

 private:
  unsigned char* shared_;
  SharedLayout layout_;
};

}  // namespace
}  // namespace ca3d
