#include "local_attention/plan.h"

#include <algorithm>

namespace ca3d {
namespace {

int64_t round_up(int64_t x, int64_t step) {
  return (x + step - 1) / step * step;
}

int element_bytes(DType computed) {
  return computed == DType::kFloat64 ? 8 : 4;
}

// Heads that one work item holds: all with a key table (it connects them), else the fewest whose
// frames fill a vector of lanes.
int64_t heads_of_item(const LocalAttentionProblem& problem, int64_t vector_lanes) {
  if (problem.key_table) return problem.heads;
  for (int64_t heads = 1; heads < problem.heads; ++heads) {
    if (problem.heads % heads == 0 && heads * problem.frames >= vector_lanes) return heads;
  }
  return problem.heads;
}

bool is_staged(const LocalAttentionProblem& problem, int64_t vector_lanes) {
  const bool converts = problem.dtype == DType::kFloat16 || problem.dtype == DType::kBFloat16;
  return converts || problem.head_dim % vector_lanes != 0;
}

}  // namespace

LocalAttentionPlan::LocalAttentionPlan(const LocalAttentionProblem& problem,
                                       const StridedRows* tensor, int vector_bytes) {
  const int64_t vector_lanes = vector_bytes / element_bytes(problem.dtype);
  const int64_t heads = heads_of_item(problem, vector_lanes);
  LocalAttentionTables& t = tables_;
  t.dtype = problem.dtype;
  t.head_dim = problem.head_dim;
  t.padded_dim = round_up(problem.head_dim, vector_lanes);
  t.staged = is_staged(problem, vector_lanes);
  t.scale = problem.scale;
  t.rows = heads * problem.frames;
  t.lanes = round_up(t.rows, vector_lanes);
  t.inner = problem.inner;
  t.groups = problem.heads / heads;
  items_ = problem.outer * problem.inner * t.groups;
  for (int i = 0; i < kOperands; ++i) {
    t.tensor[i] = tensor[i];
    t.group_stride[i] = heads * tensor[i].head;
  }
  list_windows(problem);
  place_rows(problem);
}

void LocalAttentionPlan::list_windows(const LocalAttentionProblem& problem) {
  const int64_t frames = problem.frames, size = problem.window.kernel_size;
  const bool zero = problem.window.edge == Edge::kZero;
  LocalAttentionTables& t = tables_;
  windows_.resize(t.rows);
  visible_.assign(t.lanes, 0);
  zero_slots_.assign(t.lanes, 1);  // a lane of the padding: all its weight is on a zero
  for (int64_t row = 0; row < t.rows; ++row) {
    const int64_t head = row / frames, frame = row % frames;
    std::vector<int64_t>& window = windows_[row];
    if (problem.key_table) {
      const int64_t* entry = problem.key_table + head * size * 2;
      for (int64_t n = 0; n < size; ++n, entry += 2) {
        const int64_t source = frame + entry[1] - size / 2;
        if (source >= 0 && source < frames) window.push_back(entry[0] * frames + source);
      }
    } else {
      const VisibleFrames seen = visible_frames(problem.window, frames, frame);
      for (int64_t j = 0; j < seen.count; ++j) {
        window.push_back(head * frames + seen.first + j * problem.window.dilation);
      }
    }
    const int64_t count = static_cast<int64_t>(window.size());
    visible_[row] = static_cast<double>(count);
    zero_slots_[row] = zero ? static_cast<double>(size - count) : 0.0;
    t.slots = std::max(t.slots, count);
  }
  t.visible = visible_.data();
  t.zero_slots = zero_slots_.data();
}

void LocalAttentionPlan::place_rows(const LocalAttentionProblem& problem) {
  LocalAttentionTables& t = tables_;
  for (int i = 0; i < kOperands; ++i) {
    for (int64_t row = 0; row < t.rows; ++row) {
      tensor_row_[i].push_back(row / problem.frames * t.tensor[i].head +
                               row % problem.frames * t.tensor[i].frame);
    }
    tensor_row_[i].resize(t.lanes, tensor_row_[i][0]);
    t.tensor_row[i] = tensor_row_[i].data();
  }
  std::vector<int64_t> staged(t.lanes, 0);
  for (int64_t row = 0; row < t.rows; ++row) staged[row] = row * t.padded_dim;
  const auto at = [&](Operand i) -> const std::vector<int64_t>& {
    return t.staged ? staged : tensor_row_[i];
  };

  q_row_ = at(kQ);
  k_row_ = slot_rows(at(kK));
  over_v_ = query_sums(at(kV));
  t.q_row = q_row_.data();
  t.k_row = k_row_.data();
  t.over_v = over_v_.view();
  if (!t.tensor[kGo].data) return;

  go_row_ = at(kGo);
  v_row_ = slot_rows(at(kV));
  over_k_ = query_sums(at(kK));
  over_go_ = key_sums(at(kGo));
  over_q_ = key_sums(at(kQ));
  t.go_row = go_row_.data();
  t.v_row = v_row_.data();
  t.over_k = over_k_.view();
  t.over_go = over_go_.view();
  t.over_q = over_q_.view();
}

// (lanes, slots) offsets of the rows that each lane meets; a slot that doesn't exist points to some
// row, and the kernels drop what they compute with it.
std::vector<int64_t> LocalAttentionPlan::slot_rows(const std::vector<int64_t>& row) const {
  std::vector<int64_t> offsets(tables_.lanes * tables_.slots, row[0]);
  for (int64_t lane = 0; lane < tables_.rows; ++lane) {
    int64_t* slot = offsets.data() + lane * tables_.slots;
    for (const int64_t key : windows_[lane]) *slot++ = row[key];
  }
  return offsets;
}

LocalAttentionPlan::OwnedSums LocalAttentionPlan::query_sums(
    const std::vector<int64_t>& row) const {
  OwnedSums sums;
  sums.begin.push_back(0);
  for (int64_t lane = 0; lane < tables_.rows; ++lane) {
    int64_t weight = lane;
    for (const int64_t key : windows_[lane]) {
      sums.terms.push_back({weight, row[key]});
      weight += tables_.lanes;
    }
    sums.begin.push_back(static_cast<int64_t>(sums.terms.size()));
  }
  return sums;
}

// The windows turned round: for each key row its queries, in ascending order.
LocalAttentionPlan::OwnedSums LocalAttentionPlan::key_sums(const std::vector<int64_t>& row) const {
  OwnedSums sums;
  sums.begin.assign(tables_.rows + 1, 0);
  for (const std::vector<int64_t>& window : windows_) {
    for (const int64_t key : window) ++sums.begin[key + 1];
  }
  for (int64_t key = 0; key < tables_.rows; ++key) sums.begin[key + 1] += sums.begin[key];
  sums.terms.resize(sums.begin[tables_.rows]);
  std::vector<int64_t> next = sums.begin;
  for (int64_t lane = 0; lane < tables_.rows; ++lane) {
    int64_t weight = lane;
    for (const int64_t key : windows_[lane]) {
      sums.terms[next[key]++] = {weight, row[lane]};
      weight += tables_.lanes;
    }
  }
  return sums;
}

}  // namespace ca3d
