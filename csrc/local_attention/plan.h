// What every work item of one call does, as tables: which rows meet, and where they lie in memory.
//
// A work item is a group of heads at one (outer, inner) position. Its rows are numbered
// r = head * frames + t. Each query row has a list of the key rows that its window sees, and each
// key row a list of the queries that see it; edges, dilation, causality and key tables are nothing
// but other lists, so the kernels know none of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/dispatch.h"
#include "local_attention/local_attention.h"

namespace ca3d {

enum Operand { kQ, kK, kV, kO, kGo, kDq, kDk, kDv, kOperands };

// weights[weight] * (the row at element offset `row`), one summand of a sum of rows.
struct Term {
  int64_t weight;
  int64_t row;
};

// Sum number r runs over terms[begin[r]] .. terms[begin[r + 1] - 1].
struct Sums {
  const int64_t* begin;
  const Term* terms;
};

// The tables, as the kernels see them. "Lane": a query row, and a lane of the vectors of scores;
// lanes are padded to whole vectors with queries that see nothing.
struct LocalAttentionTables {
  DType dtype;
  int64_t head_dim;
  int64_t padded_dim;  // head_dim in whole vectors: length of a staged row
  bool staged;         // rows are copied to scratch first, converted and padded
  double scale;

  int64_t rows;   // query rows of an item, and as many key rows
  int64_t lanes;  // rows in whole vectors
  int64_t slots;  // the most key rows that a query sees

  int64_t inner, groups;  // items are numbered ((outer * inner) + inner) * groups + group
  StridedRows tensor[kOperands];
  int64_t group_stride[kOperands];
  const int64_t* tensor_row[kOperands];  // (lanes): element offset of each row inside its item

  // Slot j of lane l exists if j < visible[l]; zero_slots[l] more have logit 0 and value 0.
  const double* visible;     // (lanes)
  const double* zero_slots;  // (lanes)

  // Element offsets of rows, in the staged copy or in the tensor itself. Weights lie (slots,
  // lanes).
  const int64_t* q_row;   // (lanes)
  const int64_t* go_row;  // (lanes)
  const int64_t* k_row;   // (lanes, slots)
  const int64_t* v_row;   // (lanes, slots)
  Sums over_v, over_k;    // one sum for each query row
  Sums over_go, over_q;   // one sum for each key row
};

// The kernels of one instruction set.
struct LocalAttentionKernels {
  int vector_bytes;
  // Scratch that one thread needs; a multiple of 64.
  std::size_t (*scratch_bytes)(const LocalAttentionTables&);
  // Compute the items begin .. end - 1. `scratch` is aligned to 64 bytes.
  void (*forward)(const LocalAttentionTables&, int64_t begin, int64_t end, void* scratch);
  void (*backward)(const LocalAttentionTables&, int64_t begin, int64_t end, void* scratch);
};

namespace baseline {
extern const LocalAttentionKernels local_attention_kernels;
}
namespace avx2 {
extern const LocalAttentionKernels local_attention_kernels;
}
namespace avx512 {
extern const LocalAttentionKernels local_attention_kernels;
}
namespace neon {
extern const LocalAttentionKernels local_attention_kernels;
}

// Owns the tables of one call.
class LocalAttentionPlan {
 public:
  // `tensor` has kOperands entries; without gradients (data of kGo null) there are no key sums.
  LocalAttentionPlan(const LocalAttentionProblem& problem, const StridedRows* tensor,
                     int vector_bytes);

  const LocalAttentionTables& tables() const { return tables_; }
  int64_t items() const { return items_; }

 private:
  struct OwnedSums {
    std::vector<int64_t> begin;
    std::vector<Term> terms;
    Sums view() const { return {begin.data(), terms.data()}; }
  };

  void list_windows(const LocalAttentionProblem& problem);
  void place_rows(const LocalAttentionProblem& problem);
  OwnedSums query_sums(const std::vector<int64_t>& row) const;
  OwnedSums key_sums(const std::vector<int64_t>& row) const;
  std::vector<int64_t> slot_rows(const std::vector<int64_t>& row) const;

  LocalAttentionTables tables_{};
  int64_t items_ = 0;
  std::vector<std::vector<int64_t>> windows_;  // key rows that each query row sees
  std::vector<double> visible_, zero_slots_;
  std::vector<int64_t> tensor_row_[kOperands];
  std::vector<int64_t> q_row_, go_row_, k_row_, v_row_;
  OwnedSums over_v_, over_k_, over_go_, over_q_;
};

}  // namespace ca3d
