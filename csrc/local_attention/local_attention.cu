// CUDA kernels of local temporal attention: one launch forward, one backward.
//
// The rows of k and v that a block needs are copied to shared memory once, as they are stored; q is
// read and o written straight from and to registers. A team of `lanes` neighbouring threads works
// on one row: each thread holds some of its elements, and the team adds up its dot products by
// shuffles. The backward kernel keeps the probabilities and the gradients of the scores of all
// queries in shared memory; then every row gathers what belongs to it, in a fixed order. There are
// no atomic operations, so results are bitwise repeatable.
//
// All threads of a block take every barrier and every shuffle; a thread without a row only lacks
// the loads and stores between them.
#include "local_attention/block.cuh"

namespace ca3d {
namespace {

// ---- forward ----

template <class Stored, Access kAccess>
__device__ __forceinline__ void forward(const LocalAttentionArguments& a, unsigned char* shared) {
  using B = Block<Stored, kAccess, false>;
  using Real = typename B::Real;
  const B block(a, shared);
  const int count = block.rows(a.query_rows);

  Row query = block.row(block.team, a.query_rows, &Spans::tile);
  typename B::Part q{};
  // Under way while k and v are copied.
  if (query.exists) block.load_part(block.at(a.q, query.unit, query.unit.head, query.position), &q);
  if (B::kStaged) {
    block.stage_keys();
    __syncthreads();
  }

  for (int base = 0; base < count; base += block.teams) {
    const Spans spans = spans_of<false>(a, query.unit.frames, block.tile_number);
    const auto seen = block.keys(query);
    const auto k = block.key_rows(query, spans), v = block.value_rows(query, spans);
    const Real scale = static_cast<Real>(a.scale), zeros = block.zero_slots(seen);

    // A running softmax: `largest` score so far, and sums relative to its exponential.
    Real largest = zeros > 0 ? Real{0} : minus_infinity<Real>(), total = zeros;
    typename B::Part o{};
    for (int slot = 0; slot < a.slots; slot += kSlotBlock) {
      Real score[kSlotBlock];
#pragma unroll
      for (int j = 0; j < kSlotBlock; ++j) {
        const auto key = block.key(seen, slot + j);
        score[j] = key.exists ? block.partial_dot(q, k.at(key.head, key.position)) : Real{0};
      }
      block.template team_sums<kSlotBlock>(score);
      Real reached = largest;
#pragma unroll
      for (int j = 0; j < kSlotBlock; ++j) {
        score[j] = block.key(seen, slot + j).exists ? score[j] * scale : minus_infinity<Real>();
        reached = max(reached, score[j]);
      }
      // With nothing above minus infinity yet, any finite number does.
      const Real at = reached == minus_infinity<Real>() ? Real{0} : reached;
      const Real shrink = exponential(largest - at);
      largest = reached;
      total *= shrink;
#pragma unroll
      for (int c = 0; c < B::Part::kChunks; ++c) {
#pragma unroll
        for (int j = 0; j < B::Part::kWidth; ++j) o.x[c][j] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kSlotBlock; ++j) {
        const auto key = block.key(seen, slot + j);
        if (!key.exists) continue;
        const Real weight = exponential(score[j] - at);
        total += weight;
        block.add_row(weight, v.at(key.head, key.position), &o);
      }
    }
    if (query.exists) {
      const Real share = 1 / total;
#pragma unroll
      for (int c = 0; c < B::Part::kChunks; ++c) {
#pragma unroll
        for (int j = 0; j < B::Part::kWidth; ++j) o.x[c][j] *= share;
      }
      block.store_part(o, block.at(a.o, query.unit, query.unit.head, query.position));
    }
    query = block.row(base + block.teams + block.team, a.query_rows, &Spans::tile);
    if (query.exists) {
      block.load_part(block.at(a.q, query.unit, query.unit.head, query.position), &q);
    }
  }
}

// ---- backward ----

// The most probable slot of a query, and the derivative dp of its probability.
template <class Real>
struct MostProbable {
  Real p, dp;
};

// Turns a query's scores and dp, both as they lie in shared memory, into probabilities and the
// gradients of the dot products, scale p (dp - mean) with mean = sum p dp. All dp are taken
// relative to that of the most probable slot: where p is almost 1, dp and the mean would cancel.
template <class B>
__device__ __forceinline__ void softmax_backward(const B& block, const typename B::Keys& seen,
                                                 typename B::Real* score,
                                                 typename B::Real* gradient) {
  using Real = typename B::Real;
  const LocalAttentionArguments& a = block.a;
  const Real zeros = block.zero_slots(seen);
  const int count = seen.exists ? a.slots : 0;

  Real largest = zeros > 0 ? Real{0} : minus_infinity<Real>();
  for (int n = block.lane; n < count; n += a.lanes) largest = max(largest, score[n]);
  for (int step = a.lanes / 2; step > 0; step /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, step));
  }
  const Real at = largest == minus_infinity<Real>() ? Real{0} : largest;

  const Real zero_mass = zeros > 0 ? zeros * exponential(-at) : Real{0};
  MostProbable<Real> best = {zero_mass, 0};  // of zero slots dp is 0
  Real total = 0;
  for (int n = block.lane; n < count; n += a.lanes) {
    const Real p = exponential(score[n] - at);
    score[n] = p;
    total += p;
    if (p > best.p) best = {p, gradient[n]};
  }
  total = block.team_sum(total) + zero_mass;
  for (int step = a.lanes / 2; step > 0; step /= 2) {
    const MostProbable<Real> other = {__shfl_xor_sync(kWholeWarp, best.p, step),
                                      __shfl_xor_sync(kWholeWarp, best.dp, step)};
    // Of equal ones the smaller dp, so that all lanes choose the same.
    if (other.p > best.p || (other.p == best.p && other.dp < best.dp)) best = other;
  }

  Real mean = 0;
  for (int n = block.lane; n < count; n += a.lanes) {
    const Real p = score[n] / total;
    score[n] = p;
    if (p > 0) mean += p * (gradient[n] - best.dp);
  }
  mean = block.team_sum(mean) - zero_mass / total * best.dp;
  for (int n = block.lane; n < count; n += a.lanes) {
    gradient[n] = score[n] * (gradient[n] - best.dp - mean) * static_cast<Real>(a.scale);
  }
}

// Probabilities of all queries that the block needs, and the gradients of their scores.
template <class B>
__device__ __forceinline__ void differentiate_scores(const B& block) {
  using Real = typename B::Real;
  const LocalAttentionArguments& a = block.a;
  const int count = block.rows(a.query_rows);
  for (int base = 0; base < count; base += block.teams) {
    const int index = base + block.team;
    const Row query = block.row(index, a.query_rows, &Spans::queries);
    const Spans spans = spans_of<true>(a, query.unit.frames, block.tile_number);
    const auto seen = block.keys(query);
    const auto k = block.key_rows(query, spans), v = block.value_rows(query, spans);
    typename B::Part q{}, go{};
    if (query.exists) {
      block.load_part(block.query_rows(query, spans).at(0, query.position), &q);
      block.load_part(block.gradient_rows(query, spans).at(0, query.position), &go);
      if (block.lane == 0) block.first_positions()[index] = seen.own.first;
    }
    // A thread without a row must not form an address beyond the shared memory.
    Real* score = block.scores(query.exists ? index : 0);
    Real* gradient = block.gradients(query.exists ? index : 0);
    for (int slot = 0; slot < a.slots; slot += kSlotBlock) {
      Real dots[2 * kSlotBlock];
#pragma unroll
      for (int j = 0; j < kSlotBlock; ++j) {
        const auto key = block.key(seen, slot + j);
        dots[2 * j] = dots[2 * j + 1] = 0;
        if (!key.exists) continue;
        dots[2 * j] = block.partial_dot(q, k.at(key.head, key.position));
        dots[2 * j + 1] = block.partial_dot(go, v.at(key.head, key.position));
      }
      block.template team_sums<2 * kSlotBlock>(dots);
#pragma unroll
      for (int j = 0; j < kSlotBlock; ++j) {
        const int n = slot + j;
        if (!seen.exists || n >= a.slots || block.lane != (j & (a.lanes - 1))) continue;
        const bool exists = block.key(seen, n).exists;
        score[n] = exists ? dots[2 * j] * static_cast<Real>(a.scale) : minus_infinity<Real>();
        gradient[n] = dots[2 * j + 1];
      }
    }
    __syncwarp();  // the lanes of a team share its slots differently from here on
    softmax_backward(block, seen, score, gradient);
  }
}

// Row `position` of dq: the sum over its window of the gradients of the scores times k.
template <class B, class Source>
__device__ __forceinline__ void gather_keys(const B& block, const Row& row, const Spans& spans,
                                            const Source& k, typename B::Part* dq) {
  const LocalAttentionArguments& a = block.a;
  const auto seen = block.keys(row);
  const int query =
      row.number * static_cast<int>(a.query_rows.divisor) + row.position - spans.queries.first;
  const auto* gradient = block.gradients(query);
  for (int n = 0; n < a.slots; ++n) {
    const auto key = block.key(seen, n);
    if (key.exists) block.add_row(gradient[n], k.at(key.head, key.position), dq);
  }
}

// Calls `visit` for each query that sees a key, in ascending order: with its head relative to the
// key's own, its position, its row in the block, and the slot at which it sees the key.
template <class B, class Visit>
__device__ __forceinline__ void visit_queries(const B& block, const Row& key, const Spans& spans,
                                              Visit visit) {
  const LocalAttentionArguments& a = block.a;
  const int room = static_cast<int>(a.query_rows.divisor);
  const int own = key.number * room - spans.queries.first;
  if (!a.has_table) {
    const Span queries = queries_of(a, key.unit.frames, key.position);
    const int32_t* first = block.first_positions();
    for (int32_t t = queries.first; t < queries.first + queries.count; ++t) {
      visit(0, t, own + t, key.position - first[own + t]);
    }
    return;
  }
  for (int i = a.table.reader_begin[key.unit.head]; i < a.table.reader_begin[key.unit.head + 1];
       ++i) {
    const KeyTable::Reader reader = a.table.readers[i];
    const int32_t t = key.position - reader.slot + a.slots / 2, head = reader.head - key.unit.head;
    if (t >= 0 && t < key.unit.frames) visit(head, t, own + head * room + t, reader.number);
  }
}

template <class Stored, Access kAccess>
__device__ __forceinline__ void backward(const LocalAttentionArguments& a, unsigned char* shared) {
  using B = Block<Stored, kAccess, true>;
  const B block(a, shared);
  if (B::kStaged) {
    block.stage_keys();
    block.stage_queries();
    __syncthreads();
  }
  differentiate_scores(block);
  __syncthreads();

  const int count = block.rows(a.query_rows);
  for (int index = block.team; index < count; index += block.teams) {
    const Row row = block.row(index, a.query_rows, &Spans::tile);
    if (!row.exists) continue;
    const Spans spans = spans_of<true>(a, row.unit.frames, block.tile_number);
    {
      typename B::Part dq{};
      gather_keys(block, row, spans, block.key_rows(row, spans), &dq);
      block.store_part(dq, block.at(a.dq, row.unit, row.unit.head, row.position));
    }
    typename B::Part dk{}, dv{};
    const auto q = block.query_rows(row, spans), go = block.gradient_rows(row, spans);
    visit_queries(block, row, spans, [&](int head, int32_t t, int query, int n) {
      block.add_row(block.gradients(query)[n], q.at(head, t), &dk);
      block.add_row(block.scores(query)[n], go.at(head, t), &dv);
    });
    block.store_part(dk, block.at(a.dk, row.unit, row.unit.head, row.position));
    block.store_part(dv, block.at(a.dv, row.unit, row.unit.head, row.position));
  }
}

}  // namespace

// ---- entries ----

// Blocks of the largest size that a multiprocessor holds: leaves a thread 64 registers, or 128.
template <class Stored, Access kAccess>
constexpr int kBlocksAtLeast = sizeof(Stored) < 8 && kAccess == Access::kStaged ? 4 : 2;

// The kernels for one stored type and access, under names that tools can find.
#define CA3D_ENTRIES(Stored, dtype, kAccess, access)                                      \
  extern "C" __global__ void __launch_bounds__(kMaxBlockThreads,                          \
                                               (kBlocksAtLeast<Stored, Access::kAccess>)) \
      ca3d_local_attention_forward_##dtype##_##access(                                    \
          const __grid_constant__ LocalAttentionArguments arguments) {                    \
    CA3D_DYNAMIC_SHARED(shared);                                                          \
    forward<Stored, Access::kAccess>(arguments, shared);                                  \
  }                                                                                       \
  extern "C" __global__ void __launch_bounds__(kMaxBlockThreads,                          \
                                               (kBlocksAtLeast<Stored, Access::kAccess>)) \
      ca3d_local_attention_backward_##dtype##_##access(                                   \
          const __grid_constant__ LocalAttentionArguments arguments) {                    \
    CA3D_DYNAMIC_SHARED(shared);                                                          \
    backward<Stored, Access::kAccess>(arguments, shared);                                 \
  }

#define CA3D_ENTRIES_OF_TYPE(Stored, dtype)      \
  CA3D_ENTRIES(Stored, dtype, kStaged, staged)   \
  CA3D_ENTRIES(Stored, dtype, kVectors, vectors) \
  CA3D_ENTRIES(Stored, dtype, kScalars, scalars)

CA3D_ENTRIES_OF_TYPE(float, float32)
CA3D_ENTRIES_OF_TYPE(double, float64)
CA3D_ENTRIES_OF_TYPE(Half, float16)
CA3D_ENTRIES_OF_TYPE(BFloat16, bfloat16)

namespace {

using Kernel = void (*)(LocalAttentionArguments);

#define CA3D_KERNELS_OF_TYPE(dtype)                        \
  {                                                        \
    {ca3d_local_attention_forward_##dtype##_staged,        \
     ca3d_local_attention_forward_##dtype##_vectors,       \
     ca3d_local_attention_forward_##dtype##_scalars},      \
    {                                                      \
      ca3d_local_attention_backward_##dtype##_staged,      \
          ca3d_local_attention_backward_##dtype##_vectors, \
          ca3d_local_attention_backward_##dtype##_scalars  \
    }                                                      \
  }

// By DType, direction and Access.
const Kernel kKernels[4][2][3] = {CA3D_KERNELS_OF_TYPE(float32), CA3D_KERNELS_OF_TYPE(float64),
                                  CA3D_KERNELS_OF_TYPE(float16), CA3D_KERNELS_OF_TYPE(bfloat16)};

}  // namespace

void run_local_attention(const LocalAttentionLaunch& x, int device, void* stream) {
  const DeviceGuard guard(device);
  const Kernel kernel = kKernels[static_cast<int>(x.dtype)][x.backward][static_cast<int>(x.access)];
  check(launch(kernel, x.grid, x.block, x.shared, static_cast<cudaStream_t>(stream), x.arguments));
}

}  // namespace ca3d
