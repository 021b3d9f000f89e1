// Convolutions with ReLU, folded normalisation and residual sum behind them, for inference:
//
//   z = scale relu(conv(x) + bias) + shift + residual_scale residual
//
// `folded_conv` is the convolution of width 3 x 3, stride 1 and padding 1, by Winograd's F(2, 3)
// down the image and F(4, 3) along its rows: 24 products of matrices instead of 72 make eight
// pixels. `folded_epilogue` is what follows any other convolution. Computed in float.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ca3d {

// Images are dense (images, height, width, groups * inputs or groups * outputs).
struct FoldedConvProblem {
  DType dtype;
  int64_t images, height, width;
  int64_t groups, inputs, outputs;  // channels of a group: multiples of kFoldedConvChannels
};

constexpr int64_t kFoldedConvChannels = 16;
constexpr int64_t kFoldedConvPoints = 24;

// A number for each channel of the result.
struct FoldedConvAffine {
  const float *bias, *scale, *shift, *residual_scale;
};

// Columns that lie side by side in filters of a group's `outputs` for the instruction set in use:
// filters are (groups, points, outputs / panel, inputs, panel), zeros where the last panel ends
// beyond the outputs.
int64_t folded_conv_panel(int64_t outputs);

// Both write z; residual may be null. They throw std::invalid_argument before memory is touched,
// and compute every pixel in the same order for any number of threads.
void folded_conv(const FoldedConvProblem& problem, const float* filters,
                 const FoldedConvAffine& affine, const void* x, const void* residual, void* z,
                 int threads);

// z may be y itself; (rows, channels), of a dtype that isn't double.
void folded_epilogue(DType dtype, int64_t rows, int64_t channels, const FoldedConvAffine& affine,
                     const void* y, const void* residual, void* z, int threads);

// ---- what the kernels work from ----

// A task is a number of tiles of 2 x 4 pixels and a part of the outputs of one group. Tasks come in
// the order (groups, parts, blocks): what follows each other reads the same filters.
struct FoldedConvTables {
  FoldedConvProblem problem;
  const float* filters;
  FoldedConvAffine affine;
  const void *x, *residual;
  void* z;
  int64_t tile_rows, tile_columns, tiles, task_tiles, blocks;
  int64_t panel, panels, parts;  // panels of a group's outputs, as in the filters
};

// Columns of a panel, and rows (tiles) that are multiplied at once.
struct FoldedConvPanel {
  int64_t columns, rows;
};

// The kernels of one instruction set.
struct FoldedConvKernels {
  // The wide one is the faster, if it needs no more columns of zeros.
  FoldedConvPanel wide, narrow;
  std::size_t (*scratch_bytes)(const FoldedConvTables&);
  // Tasks begin .. end - 1; `scratch` is aligned to 64 bytes.
  void (*run)(const FoldedConvTables&, int64_t begin, int64_t end, void* scratch);
  void (*epilogue)(DType dtype, int64_t rows, int64_t channels, const FoldedConvAffine& affine,
                   const void* y, const void* residual, void* z);
};

namespace baseline {
extern const FoldedConvKernels folded_conv_kernels;
}
namespace avx2 {
extern const FoldedConvKernels folded_conv_kernels;
}
namespace avx512 {
extern const FoldedConvKernels folded_conv_kernels;
}
namespace neon {
extern const FoldedConvKernels folded_conv_kernels;
}

}  // namespace ca3d
