// Local temporal attention: the problem, and which frames a window sees. CPU and GPU share this.
//
//   o[h, t] = sum_n p[h, t, n] v[h, s(t, n)]
//   p[h, t, :] = softmax over n of scale q[h, t] . k[h, s(t, n)]
//
// Slot n (of 0 .. K-1) of frame t is frame s(t, n) = t + (n - K/2) dilation; causal windows end at
// t.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"
#include "common/strided.h"

namespace ca3d {

// What lies outside the clip: no slot; a slot with logit 0 and value 0; or nothing, because the
// window is moved inwards until it has its full size (a causal one never is).
enum class Edge { kTruncate = 0, kZero = 1, kShift = 2 };

struct Window {
  int64_t kernel_size;
  int64_t dilation;
  bool causal;
  Edge edge;
};

struct LocalAttentionProblem {
  DType dtype;
  int64_t outer, inner, heads, frames, head_dim;
  Window window;
  double scale;
  // nullptr, or (heads, kernel_size, 2): head and window slot that slot n of head h reads.
  const int64_t* key_table;
};

// The frames first, first + dilation, ... (count of them) that the window of one frame sees.
struct VisibleFrames {
  int64_t first;
  int64_t count;
};

// `static`, not just `inline`: this header is compiled for several instruction sets.
CA3D_HOST_DEVICE static inline VisibleFrames visible_frames(Window window, int64_t frames,
                                                            int64_t t) {
  // Frames that are congruent modulo the dilation are numbered: t is frame `position` of `length`.
  const int64_t phase = t % window.dilation, position = t / window.dilation;
  const int64_t length = (frames - phase - 1) / window.dilation + 1;
  int64_t begin = position - (window.causal ? window.kernel_size - 1 : window.kernel_size / 2);
  if (window.edge == Edge::kShift && !window.causal) {
    if (begin > length - window.kernel_size) begin = length - window.kernel_size;
    if (begin < 0) begin = 0;
  }
  int64_t end = begin + window.kernel_size;
  if (begin < 0) begin = 0;
  if (end > length) end = length;
  return {phase + begin * window.dilation, end - begin};
}

// The frames first, first + dilation, ... (count of them) whose windows hold frame s: neighbours,
// because windows begin in the order of their frames.
CA3D_HOST_DEVICE static inline VisibleFrames querying_frames(Window window, int64_t frames,
                                                             int64_t s) {
  const int64_t phase = s % window.dilation, position = s / window.dilation;
  const int64_t length = (frames - phase - 1) / window.dilation + 1;
  const int64_t after = window.causal ? window.kernel_size - 1 : window.kernel_size / 2;
  int64_t begin = position + after + 1 - window.kernel_size, end = position + after + 1;
  if (window.edge == Edge::kShift && !window.causal) {
    if (position < window.kernel_size) begin = 0;
    if (position >= length - window.kernel_size) end = length;
  }
  if (begin < 0) begin = 0;
  if (end > length) end = length;
  return {phase + begin * window.dilation, end - begin};
}

// Throws std::invalid_argument for a problem that makes no sense.
void check(const LocalAttentionProblem& problem);

// o = attention(q, k, v). Throws std::invalid_argument before memory is touched.
void local_attention_forward(const LocalAttentionProblem& problem, const StridedRows& q,
                             const StridedRows& k, const StridedRows& v, const StridedRows& o,
                             int threads);

// (dq, dk, dv) from the gradient `go` of o; the probabilities are computed again. Every element is
// summed by one thread in a fixed order, so the result doesn't depend on the number of threads.
void local_attention_backward(const LocalAttentionProblem& problem, const StridedRows& q,
                              const StridedRows& k, const StridedRows& v, const StridedRows& go,
                              const StridedRows& dq, const StridedRows& dk, const StridedRows& dv,
                              int threads);

}  // namespace ca3d
