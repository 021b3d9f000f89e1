// CPU kernels of local temporal attention, compiled once per instruction set.
//
// Scores of a vector's worth of queries are dot products that stay vectors of partial sums until a
// tree of shuffles adds up a whole vector of them, so that lanes become queries; the softmax then
// runs vertically, slot by slot. Rows of v are summed with broadcast weights.
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/scratch.h"
#include "common/simd.h"
#include "local_attention/plan.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

// The type that a stored type is computed in.
template <class Stored>
using Computed =
    typename std::conditional<std::is_same<Stored, double>::value, double, float>::type;

// ---- memory ----

constexpr int64_t kCacheLine = 64;

// Asks for the rows of an item that comes later, a few at a time between arithmetic. They are short
// and far apart, which the processor's own prefetching does not follow; and asked for all at once
// they would fill its queue of outstanding lines, and the arithmetic would wait.
class RowsAhead {
 public:
  RowsAhead(int64_t rows, int64_t row_bytes) : rows_(rows), row_bytes_(row_bytes) {}

  void add(const void* from, const int64_t* row_offset, int64_t element_bytes) {
    operand_[operands_++] = {static_cast<const char*>(from), row_offset, element_bytes};
  }

  void ask(int64_t count) {
    for (; count > 0 && row_ < rows_; --count, ++row_) {
      for (int i = 0; i < operands_; ++i) {
        const Rows& x = operand_[i];
        const char* row = x.from + x.row_offset[row_] * x.element_bytes;
        for (int64_t byte = 0; byte < row_bytes_; byte += kCacheLine) {
          __builtin_prefetch(row + byte);
        }
      }
    }
  }

 private:
  struct Rows {
    const char* from;
    const int64_t* row_offset;
    int64_t element_bytes;
  };
  Rows operand_[4];
  int operands_ = 0;
  int64_t row_ = 0, rows_, row_bytes_;
};

// ---- scores ----

// Slots that are computed together: as many accumulators and a row of q stay in registers.
constexpr int kSlotBlock = 5;
// Queries whose dot products one call reduces.
constexpr int kLeafQueries = kVectorBytes / 8 < 4 ? kVectorBytes / 8 : 4;
constexpr int kRowsAheadPerLeaf = 2;

// Partial sums over head_dim of left . right for one query and kSlots slots.
template <int kSlots, class Left, class Real>
inline void partial_dots(const Left* left, const Real* right, const int64_t* right_row, int64_t dim,
                         Vector<Real>* sum) {
#pragma GCC unroll 8
  for (int j = 0; j < kSlots; ++j) sum[j] = Vector<Real>{};
  for (int64_t i = 0; i < dim; i += kLanes<Real>) {
    const Vector<Real> x = load(left + i);
#pragma GCC unroll 8
    for (int j = 0; j < kSlots; ++j) sum[j] += x * load(right + right_row[j] + i);
  }
}

// What the dot products of some queries need: query `lane` has its row at left + left_row[lane],
// and meets the rows right + right_row[lane * slots + j].
template <class Left, class Real>
struct DotOperands {
  const Left* left;
  const int64_t* left_row;
  const Real* right;
  const int64_t* right_row;
  int64_t slots;
  int64_t dim;
  RowsAhead* ahead;
};

// Dot products of kQueries neighbouring queries with kSlots slots, reduced over all lane bits below
// kQueries: lane i of sum[j] belongs to query i % kQueries.
template <int kQueries, int kSlots, class Left, class Real>
inline void reduced_dots(const DotOperands<Left, Real>& x, int64_t lane, int64_t slot,
                         Vector<Real>* sum) {
  if constexpr (kQueries == 1) {
    partial_dots<kSlots>(x.left + x.left_row[lane], x.right, x.right_row + lane * x.slots + slot,
                         x.dim, sum);
  } else {
    constexpr int kHalf = kQueries / 2;
    Vector<Real> low[kSlots], high[kSlots];
    reduced_dots<kHalf, kSlots>(x, lane, slot, low);
    reduced_dots<kHalf, kSlots>(x, lane + kHalf, slot, high);
#pragma GCC unroll 8
    for (int j = 0; j < kSlots; ++j) sum[j] = pair_sums<kHalf, Real>(low[j], high[j]);
  }
}

// Dot products of a whole vector of queries; the leaves of the tree are calls, to keep code small.
template <int kQueries, int kSlots, class Left, class Real>
[[gnu::noinline]] void leaf_dots(const DotOperands<Left, Real>& x, int64_t lane, int64_t slot,
                                 Vector<Real>* sum) {
  x.ahead->ask(kRowsAheadPerLeaf);
  reduced_dots<kQueries, kSlots>(x, lane, slot, sum);
}

template <int kQueries, int kSlots, class Left, class Real>
inline void vector_dots(const DotOperands<Left, Real>& x, int64_t lane, int64_t slot,
                        Vector<Real>* sum) {
  if constexpr (kQueries <= kLeafQueries) {
    leaf_dots<kQueries, kSlots>(x, lane, slot, sum);
  } else {
    constexpr int kHalf = kQueries / 2;
    Vector<Real> low[kSlots], high[kSlots];
    vector_dots<kHalf, kSlots>(x, lane, slot, low);
    vector_dots<kHalf, kSlots>(x, lane + kHalf, slot, high);
#pragma GCC unroll 8
    for (int j = 0; j < kSlots; ++j) sum[j] = pair_sums<kHalf, Real>(low[j], high[j]);
  }
}

template <int kSlots, class Left, class Real>
void store_dots(const DotOperands<Left, Real>& x, int64_t lane, int64_t slot, Real* dots,
                int64_t lanes) {
  Vector<Real> sum[kSlots];
  vector_dots<kLanes<Real>, kSlots>(x, lane, slot, sum);
  for (int j = 0; j < kSlots; ++j) store(dots + j * lanes, sum[j]);
}

// dots[slot * lanes + lane] = left . right of every query and slot.
template <class Left, class Real>
void dot_products(const DotOperands<Left, Real>& x, int64_t lanes, Real* dots) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) {
    for (int64_t slot = 0; slot < x.slots; slot += kSlotBlock) {
      Real* to = dots + slot * lanes + lane;
      switch (x.slots - slot) {
        case 1:
          store_dots<1>(x, lane, slot, to, lanes);
          break;
        case 2:
          store_dots<2>(x, lane, slot, to, lanes);
          break;
        case 3:
          store_dots<3>(x, lane, slot, to, lanes);
          break;
        case 4:
          store_dots<4>(x, lane, slot, to, lanes);
          break;
        default:
          store_dots<kSlotBlock>(x, lane, slot, to, lanes);
      }
    }
  }
}

// ---- softmax ----

// What the windows of the queries hold, by lane.
template <class Real>
struct SlotCounts {
  const Real* visible;
  const Real* zeros;
};

// Turns scores (slots, lanes) into probabilities in place; slots that don't exist get 0. The zero
// slots of a query get zero_mass[lane] together.
template <class Real>
void softmax(const SlotCounts<Real>& counts, Real scale, int64_t slots, int64_t lanes, Real* scores,
             Real* zero_mass) {
  const Vector<Real> nothing = broadcast(-static_cast<Real>(__builtin_inf()));
  for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) {
    const Vector<Real> visible = load(counts.visible + lane), zeros = load(counts.zeros + lane);
    Vector<Real> largest = zeros > 0 ? Vector<Real>{} : nothing;
    Real* score = scores + lane;
    for (int64_t j = 0; j < slots; ++j, score += lanes) {
      const Vector<Real> x = visible > static_cast<Real>(j) ? load(score) * scale : nothing;
      largest = max<Real>(x, largest);
      store(score, x);
    }
    const Vector<Real> at_zero = zeros * exp_of_nonpositive<Real>(-largest);
    const Vector<Real> all_zeros = zeros > 0 ? at_zero : Vector<Real>{};
    Vector<Real> total = all_zeros;
    score = scores + lane;
    for (int64_t j = 0; j < slots; ++j, score += lanes) {
      const Vector<Real> x = exp_of_nonpositive<Real>(load(score) - largest);
      total += x;
      store(score, x);
    }
    score = scores + lane;
    for (int64_t j = 0; j < slots; ++j, score += lanes) store(score, load(score) / total);
    store(zero_mass + lane, all_zeros / total);
  }
}

// Turns dp (slots, lanes) into the gradient of the dot products, scale p (dp - mean), in place,
// with mean = sum_j p dp. All dp are taken relative to that of the most probable slot: where p is
// almost 1, dp and the mean would cancel.
template <class Real>
void softmax_backward(const SlotCounts<Real>& counts, Real scale, int64_t slots, int64_t lanes,
                      const Real* p, const Real* zero_mass, Real* dp) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes<Real>) {
    const Vector<Real> visible = load(counts.visible + lane);
    const Vector<Real> zeros = load(zero_mass + lane);
    Vector<Real> largest = zeros, reference = {};  // of zero slots dp is 0
    for (int64_t j = 0; j < slots; ++j) {
      const Vector<Real> x = load(p + j * lanes + lane);
      reference = x > largest ? load(dp + j * lanes + lane) : reference;
      largest = max<Real>(x, largest);
    }
    Vector<Real> mean = zeros * -reference;
    for (int64_t j = 0; j < slots; ++j) {
      Real* at = dp + j * lanes + lane;
      const Vector<Real> relative = load(at) - reference;
      const Vector<Real> product = load(p + j * lanes + lane) * relative;
      mean += visible > static_cast<Real>(j) ? product : Vector<Real>{};
      store(at, relative);
    }
    for (int64_t j = 0; j < slots; ++j) {
      Real* at = dp + j * lanes + lane;
      store(at, load(p + j * lanes + lane) * (load(at) - mean) * scale);
    }
  }
}

// ---- sums of rows ----

// Elements i .. i + kVectors * W - 1 of the row sum_t weights[t.weight] * rows[t.row ...].
template <int kVectors, class Real>
inline void sum_part(const Term* term, const Term* end, const Real* weights, const Real* rows,
                     int64_t i, Vector<Real>* sum) {
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) sum[c] = Vector<Real>{};
  for (; term != end; ++term) {
    const Real weight = weights[term->weight];
    const Real* row = rows + term->row + i;
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[c] += weight * load(row + c * kLanes<Real>);
  }
}

// Writes sums of rows to the rows of a tensor: to + to_row[r] gets sum number r.
template <class Stored, class Real>
void write_sums(const Sums& sums, const Real* weights, const Real* rows, int64_t count, int64_t dim,
                const int64_t* to_row, Stored* to, RowsAhead* ahead) {
  constexpr int kWidth = kLanes<Real>, kTile = 4;
  const Term *terms = sums.terms, *begin = terms + sums.begin[0];
  for (int64_t r = 0; r < count; ++r) {
    const Term* end = terms + sums.begin[r + 1];
    Stored* row = to + to_row[r];
    ahead->ask(1);
    int64_t i = 0;
    for (; i + kTile * kWidth <= dim; i += kTile * kWidth) {
      Vector<Real> sum[kTile];
      sum_part<kTile>(begin, end, weights, rows, i, sum);
#pragma GCC unroll 8
      for (int c = 0; c < kTile; ++c) store(row + i + c * kWidth, sum[c]);
    }
    for (; i < dim; i += kWidth) {
      Vector<Real> sum;
      sum_part<1>(begin, end, weights, rows, i, &sum);
      if (i + kWidth <= dim) {
        store(row + i, sum);
      } else {
        Stored rest[kWidth];
        store(rest, sum);
        __builtin_memcpy(row + i, rest, (dim - i) * sizeof(Stored));
      }
    }
    begin = end;
  }
}

// ---- items ----

// Element offset of an item in a tensor.
inline int64_t item_offset(const LocalAttentionTables& x, int operand, int64_t item) {
  const int64_t group = item % x.groups, position = item / x.groups;
  return position / x.inner * x.tensor[operand].outer +
         position % x.inner * x.tensor[operand].inner + group * x.group_stride[operand];
}

// Copies rows, converted and padded with zeros to whole vectors.
template <class Stored, class Real>
void stage_rows(const Stored* from, const int64_t* from_row, int64_t rows, int64_t dim,
                int64_t padded_dim, Real* to) {
  constexpr int kCount = kLanes<Real>;
  const int64_t whole = dim / kCount * kCount;
  for (int64_t r = 0; r < rows; ++r, to += padded_dim) {
    const Stored* row = from + from_row[r];
#pragma GCC unroll 4
    for (int64_t i = 0; i < whole; i += kCount) store(to + i, load(row + i));
    if (whole < dim) {
      Stored rest[kCount] = {};
      __builtin_memcpy(rest, row + whole, (dim - whole) * sizeof(Stored));
      store(to + whole, load(rest));
    }
  }
}

// The kernels for one stored type, with the scratch memory of one thread.
template <class Stored>
class Worker {
 public:
  using Real = Computed<Stored>;

  Worker(const LocalAttentionTables& tables, void* memory)
      : x_(tables), scratch_(memory), backward_(tables.tensor[kGo].data != nullptr) {
    visible_ = scratch_.take<Real>(x_.lanes);
    zeros_ = scratch_.take<Real>(x_.lanes);
    zero_mass_ = scratch_.take<Real>(x_.lanes);
    p_ = scratch_.take<Real>(x_.lanes * x_.slots);
    if (backward_) ds_ = scratch_.take<Real>(x_.lanes * x_.slots);
    if (!x_.staged) return;
    constexpr int kStaged[] = {kQ, kK, kV, kGo};
    for (const int operand : kStaged) {
      if (operand != kGo || backward_) {
        staged_[operand] = scratch_.take<Real>(x_.rows * x_.padded_dim);
      }
    }
  }

  std::size_t scratch_bytes() const { return scratch_.used(); }

  void start() {
    for (int64_t lane = 0; lane < x_.lanes; ++lane) {
      visible_[lane] = static_cast<Real>(x_.visible[lane]);
      zeros_[lane] = static_cast<Real>(x_.zero_slots[lane]);
    }
  }

  // Computes an item, and asks for the rows of the one that comes next.
  void forward(int64_t item, int64_t next) {
    RowsAhead ahead = rows_ahead(next);
    const Real *k = rows(kK, item), *v = rows(kV, item);
    if (x_.head_dim == x_.padded_dim) {  // a row of q is read once: no need to stage it
      probabilities(tensor(kQ, item), x_.tensor_row[kQ], k, &ahead);
    } else {
      probabilities(rows(kQ, item), x_.q_row, k, &ahead);
    }
    write(kO, item, x_.over_v, p_, v, &ahead);
  }

  void backward(int64_t item, int64_t next) {
    RowsAhead ahead = rows_ahead(next);
    const Real *q = rows(kQ, item), *k = rows(kK, item), *v = rows(kV, item);
    const Real* go = rows(kGo, item);
    probabilities(q, x_.q_row, k, &ahead);
    dot_products<Real, Real>({go, x_.go_row, v, x_.v_row, x_.slots, x_.padded_dim, &ahead},
                             x_.lanes, ds_);
    softmax_backward<Real>({visible_, zeros_}, scale(), x_.slots, x_.lanes, p_, zero_mass_, ds_);
    write(kDq, item, x_.over_k, ds_, k, &ahead);
    write(kDk, item, x_.over_q, ds_, q, &ahead);
    write(kDv, item, x_.over_go, p_, go, &ahead);
  }

 private:
  Real scale() const { return static_cast<Real>(x_.scale); }

  Stored* tensor(int operand, int64_t item) const {
    return static_cast<Stored*>(x_.tensor[operand].data) + item_offset(x_, operand, item);
  }

  // The rows of an item: in place, or converted and padded with zeros in scratch.
  const Real* rows(int operand, int64_t item) {
    const Stored* from = tensor(operand, item);
    if constexpr (std::is_same<Stored, Real>::value) {
      if (!x_.staged) return from;
    }
    stage_rows(from, x_.tensor_row[operand], x_.rows, x_.head_dim, x_.padded_dim, staged_[operand]);
    return staged_[operand];
  }

  template <class Query>
  void probabilities(const Query* q, const int64_t* q_row, const Real* k, RowsAhead* ahead) {
    dot_products<Query, Real>({q, q_row, k, x_.k_row, x_.slots, x_.padded_dim, ahead}, x_.lanes,
                              p_);
    softmax<Real>({visible_, zeros_}, scale(), x_.slots, x_.lanes, p_, zero_mass_);
  }

  RowsAhead rows_ahead(int64_t item) const {
    constexpr int64_t kBytes = sizeof(Stored);
    RowsAhead ahead(x_.rows, x_.head_dim * kBytes);
    constexpr int kRead[] = {kQ, kK, kV, kGo};
    for (const int operand : kRead) {
      if (operand != kGo || backward_) {
        ahead.add(tensor(operand, item), x_.tensor_row[operand], kBytes);
      }
    }
    return ahead;
  }

  void write(int operand, int64_t item, const Sums& sums, const Real* weights, const Real* from,
             RowsAhead* ahead) {
    write_sums(sums, weights, from, x_.rows, x_.head_dim, x_.tensor_row[operand],
               tensor(operand, item), ahead);
  }

  const LocalAttentionTables& x_;
  Scratch scratch_;
  bool backward_;
  Real *visible_, *zeros_, *zero_mass_, *p_, *ds_ = nullptr;
  Real* staged_[kOperands] = {};
};

// Calls `visit` with a (null) pointer to the stored type.
template <class Visit>
inline void with_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(static_cast<double*>(nullptr));
    case DType::kFloat32:
      return visit(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return visit(static_cast<BFloat16*>(nullptr));
  }
}

std::size_t scratch_bytes(const LocalAttentionTables& tables) {
  std::size_t bytes = 0;
  with_type(tables.dtype, [&](auto* type) {
    using Stored = std::remove_pointer_t<decltype(type)>;
    bytes = Worker<Stored>(tables, nullptr).scratch_bytes();
  });
  return bytes;
}

void forward(const LocalAttentionTables& tables, int64_t begin, int64_t end, void* scratch) {
  with_type(tables.dtype, [&](auto* type) {
    Worker<std::remove_pointer_t<decltype(type)>> worker(tables, scratch);
    worker.start();
    for (int64_t item = begin; item < end; ++item) {
      worker.forward(item, item + 1 < end ? item + 1 : item);
    }
  });
}

void backward(const LocalAttentionTables& tables, int64_t begin, int64_t end, void* scratch) {
  with_type(tables.dtype, [&](auto* type) {
    Worker<std::remove_pointer_t<decltype(type)>> worker(tables, scratch);
    worker.start();
    for (int64_t item = begin; item < end; ++item) {
      worker.backward(item, item + 1 < end ? item + 1 : item);
    }
  });
}

}  // namespace

extern const LocalAttentionKernels local_attention_kernels = {kVectorBytes, &scratch_bytes,
                                                              &forward, &backward};

}  // namespace CA3D_ISA
}  // namespace ca3d
