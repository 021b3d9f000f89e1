// The temporal half of a CAST block with folded normalisations, for inference. Pixel by pixel, for
// each head with its d channels, over the frames t of the clip:
//
//   qkv[t] = x[t] qkv_weight + qkv_bias[t]
//   y[t]   = norm_scale (x[t] + attention(q, k, v)[t]) + norm_shift[t]
//   and for each residual block of the column, with conv over t, of width 3, padded with zeros:
//   u[t]   = scale1 relu(conv1(y)[t] + bias1) + shift1
//   y[t]  += scale2 relu(conv2(u)[t] + bias2) + shift2
//
// Computed in float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "local_attention/local_attention.h"

namespace ca3d {

struct TemporalBlockProblem {
  // `outer` * `inner` pixels; see local_attention.h for the window, the scale and the key table.
  LocalAttentionProblem attention;
  int64_t convolutions;  // two for each residual block
};

// Dense, of the problem's dtype; d is head_dim, H heads, T frames. A column_weight is
// (convolutions, H, 3 d, d): inputs of frames t - 1, t, t + 1, then outputs.
struct TemporalBlockWeights {
  const void* qkv_weight;   // (H, d, 3 d): inputs, then outputs q, k, v
  const void* qkv_bias;     // (H, T, 3 d)
  const void* norm_scale;   // (H, d)
  const void* norm_shift;   // (H, T, d)
  const float* filters;     // from `temporal_block_filters`
  const void* column_bias;  // (convolutions, H, d); scale and shift likewise
  const void* column_scale;
  const void* column_shift;
};

// A clip: element (o, t, i, c) lies at o * outer + t * frame + i * inner + c.
struct TemporalBlockClip {
  void* data;
  int64_t outer, frame, inner;
};

// Writes the block's output for x. Throws std::invalid_argument before memory is touched. Every
// pixel is computed by one thread, in the same order for any number of threads.
void temporal_block(const TemporalBlockProblem& problem, const TemporalBlockWeights& weights,
                    const TemporalBlockClip& x, const TemporalBlockClip& out, int threads);

// Filters in the form that the kernels read: `temporal_block_filter_count` floats from a
// column_weight. Four frames of a convolution are computed with 6 products of matrices instead of
// 12 (Winograd's F(4, 3)); where clips are too short for that, one after the other.
int64_t temporal_block_filter_count(const TemporalBlockProblem& problem);
void temporal_block_filters(const TemporalBlockProblem& problem, const void* column_weight,
                            float* filters, int threads);

// ---- what the kernels work from ----

// Rows of head_dim are padded with zeros to a multiple of this: of the lanes of every instruction
// set.
constexpr int64_t kTemporalBlockPadding = 16;

// Products for four frames; see `temporal_block_filters`.
constexpr int64_t kTemporalBlockPoints = 6;

// Weights as floats, rows padded; of head h at data + h * head, of convolution i at + i * step.
struct TemporalBlockMatrix {
  const float* data;
  int64_t head, step;
};

struct TemporalBlockTables {
  DType dtype;
  int64_t inner, heads, frames, head_dim, padded_dim, convolutions;
  TemporalBlockClip x, out;
  TemporalBlockMatrix qkv_weight, qkv_bias, norm_scale, norm_shift;
  TemporalBlockMatrix filters, column_bias, column_scale, column_shift;
  // Of a filter: 3 matrices, one a frame, or kTemporalBlockPoints. Tiles of 4 frames of a clip, and
  // the frames that it has with zeros before and after.
  int64_t points, tiles, padded_frames;
  float scale;
  // A task is a block of pixels for one head, or for all of them if keys are of other heads.
  int64_t pixels, block_pixels, blocks, group_heads;
  // Of query frame t of head h (of head 0 if all have keys of their own), entry h * frames + t: how
  // many frames it sees, how many zeros, and in key_row[entry * slots + j] what slot j shows:
  // source head * frames + frame, where the own head is 0.
  int64_t slots;
  const float *visible, *zeros;
  const int64_t* key_row;
};

// The kernels of one instruction set.
struct TemporalBlockKernels {
  int64_t register_rows;  // rows of a matrix that are multiplied at once
  std::size_t (*scratch_bytes)(const TemporalBlockTables&);
  // Tasks begin .. end - 1; `scratch` is aligned to 64 bytes.
  void (*run)(const TemporalBlockTables&, int64_t begin, int64_t end, void* scratch);
  // Converts `rows` rows of `columns` elements and pads them with zeros.
  void (*widen)(DType dtype, const void* from, int64_t rows, int64_t columns,
                int64_t padded_columns, float* to);
  // Filters of one convolution of one head, `points` times (padded_dim, padded_dim), from
  // (3 head_dim, head_dim) elements. `scratch` holds 3 padded_dim * padded_dim floats.
  void (*filters)(DType dtype, const void* from, int64_t head_dim, int64_t padded_dim,
                  int64_t points, float* scratch, float* to);
};

namespace baseline {
extern const TemporalBlockKernels temporal_block_kernels;
}
namespace avx2 {
extern const TemporalBlockKernels temporal_block_kernels;
}
namespace avx512 {
extern const TemporalBlockKernels temporal_block_kernels;
}
namespace neon {
extern const TemporalBlockKernels temporal_block_kernels;
}

}  // namespace ca3d
