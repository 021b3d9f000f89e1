// How one call of local attention is launched on a GPU, decided on the host without a GPU.
//
// Frames that are congruent modulo the dilation never meet others: they are numbered 0, 1, ...
// (positions), and a dilation is nothing but more, shorter sequences. A *unit* is one such sequence
// of one head. Units are numbered ((outer * inner + inner) * phases + phase) * heads + head, and a
// block takes some neighbouring units, or one tile of the positions of one unit. With a key table,
// which connects heads, the units of a block are all heads of one place.
//
// A row (head_dim elements) belongs to `lanes` neighbouring threads, a power of two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/argument_field.h"
#include "common/divider.h"
#include "local_attention/local_attention.h"

namespace ca3d {

// How a kernel reads rows: 16 bytes at a time through shared memory, 16 bytes at a time from where
// they lie (if the rows that meet don't fit into shared memory), or element by element.
enum class Access { kStaged, kVectors, kScalars };

constexpr int kWarpLanes = 32;
constexpr int kMaxBlockThreads = 256;
constexpr int64_t kMaxGpuHeadDim = 128;

// The key table, and the same turned round: who reads the rows of head g are entries
// reader_begin[g] .. reader_begin[g + 1] - 1 of readers.
struct KeyTable {
  static constexpr int kMaxEntries = 256;

  struct Source {
    uint8_t head, slot;
  };
  struct Reader {
    uint8_t head, number, slot;  // slot `number` of `head` reads window slot `slot`
  };

  Source source[kMaxEntries];  // (heads, kernel_size)
  Reader readers[kMaxEntries];
  uint16_t reader_begin[kMaxEntries + 1];
};

// The only parameter of every kernel, by value.
struct LocalAttentionArguments {
  StridedRows q, k, v, o, go, dq, dk, dv;
  double scale;
  Window window;  // of positions: its dilation is 1
  int64_t dilation;
  int32_t longest;      // positions of the sequences of the first `full_phases` phases;
  int32_t full_phases;  // those of the others have one less
  int32_t head_dim;
  int32_t lanes;       // 2^lane_shift
  int32_t lane_shift;  // of the kernel's divisions by lanes
  int32_t units;       // of the call
  int32_t units_per_block;
  int32_t slots;  // most rows that a query sees; with a key table, kernel_size
  int32_t tile;   // positions whose results a block writes
  int32_t has_table;
  Divider tiles, heads, phases, inner;
  Divider query_rows, key_rows;  // room for the rows of a unit that a block needs
  KeyTable table;
};

struct LocalAttentionLaunch {
  bool backward;
  DType dtype;
  Access access;
  unsigned grid, block;
  size_t shared;
  LocalAttentionArguments arguments;
};

// Where the pieces of a block's shared memory begin, in bytes; `end` is its size.
struct SharedLayout {
  int32_t k, v, q, go, scores, gradients, first, end;
};

// Rows are staged only if `staged`; scores are kept only for the backward pass.
CA3D_HOST_DEVICE inline SharedLayout shared_layout(const LocalAttentionArguments& a, bool staged,
                                                   bool backward, int element_bytes) {
  const int real_bytes = element_bytes == 8 ? 8 : 4;
  const int queries = a.units_per_block * static_cast<int>(a.query_rows.divisor);
  const int keys = a.units_per_block * static_cast<int>(a.key_rows.divisor);
  const int row = staged ? a.head_dim * element_bytes : 0;
  SharedLayout at{};
  at.k = 0;
  at.v = at.k + keys * row;
  at.q = at.v + keys * row;
  at.go = at.q + (backward ? queries * row : 0);
  at.scores = at.go + (backward ? queries * row : 0);
  at.gradients = at.scores + (backward ? queries * a.slots * real_bytes : 0);
  at.first = at.gradients + (backward ? queries * a.slots * real_bytes : 0);
  at.end = at.first + (backward ? queries * 4 : 0);
  return at;
}

// Decides the launch of a checked problem with at least one element. Tensors that a direction
// doesn't use may be empty. Throws Unsupported, naming the limit.
LocalAttentionLaunch plan_forward(const LocalAttentionProblem& problem, const StridedRows& q,
                                  const StridedRows& k, const StridedRows& v, const StridedRows& o);
LocalAttentionLaunch plan_backward(const LocalAttentionProblem& problem, const StridedRows& q,
                                   const StridedRows& k, const StridedRows& v,
                                   const StridedRows& go, const StridedRows& dq,
                                   const StridedRows& dk, const StridedRows& dv);

// Name of the kernel in the compiled code, such as ca3d_local_attention_forward_float16_staged.
std::string entry_name(const LocalAttentionLaunch& launch);

// The fields of the kernel's argument that its direction uses.
std::vector<ArgumentField> argument_fields(const LocalAttentionLaunch& launch);

// Queues the kernel on a stream of a device. Throws CudaError.
void run_local_attention(const LocalAttentionLaunch& launch, int device, void* stream);

}  // namespace ca3d
