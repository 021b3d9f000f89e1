// CPU kernels of the folded convolution, compiled once per instruction set.
//
// A task takes tiles of 2 x 4 pixels, which read 4 x 6. Their linear combinations, 24 for each tile
// and channel, are 24 matrices (tiles, inputs); each is multiplied by the filters of its point, and
// combinations of the 24 products are the pixels.
#include "common/gemm.h"
#include "common/simd.h"
#include "folded_conv/folded_conv.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

constexpr int kCount = kLanes<float>;
constexpr int kDown = 4, kAlong = 6;  // pixels that a tile reads
constexpr int kPoints = kDown * kAlong;
constexpr int64_t kTileRows = 2, kTileColumns = 4;
using V = Vector<float>;

static_assert(kPoints == kFoldedConvPoints, "a point is a combination of rows and one of columns");
static_assert(kFoldedConvChannels % kCount == 0, "channels are whole vectors");

template <class Stored>
class Worker {
 public:
  Worker(const FoldedConvTables& tables, void* scratch) : t_(tables), p_(tables.problem) {
    inputs_ = static_cast<float*>(scratch);
    outputs_ = inputs_ + kPoints * plane(t_, p_.inputs);
  }

  static std::size_t scratch_bytes(const FoldedConvTables& t) {
    const int64_t most = (t.panels + t.parts - 1) / t.parts * t.panel;
    const int64_t floats = kPoints * (plane(t, t.problem.inputs) + plane(t, most));
    return static_cast<std::size_t>(floats) * sizeof(float);
  }

  void run(int64_t task) {
    const int64_t group = task / (t_.parts * t_.blocks), part = task / t_.blocks % t_.parts;
    const int64_t first = task % t_.blocks * t_.task_tiles, left = t_.tiles - first;
    tiles_ = left < t_.task_tiles ? left : t_.task_tiles;
    first_panel_ = part * t_.panels / t_.parts;
    wide_ = ((part + 1) * t_.panels / t_.parts - first_panel_) * t_.panel;
    for (int64_t i = 0; i < tiles_; ++i) combine_inputs(first + i, i, group);
    multiply(group);
    for (int64_t i = 0; i < tiles_; ++i) combine_products(first + i, i, group);
  }

 private:
  // Elements of one point's matrix; the odd line keeps the points' rows out of one set of a cache.
  static int64_t plane(const FoldedConvTables& t, int64_t columns) {
    return t.task_tiles * columns + kCacheLine;
  }

  struct Place {
    int64_t image, row, column;  // of the tile's first pixel
  };

  Place place(int64_t tile) const {
    const int64_t of_image = t_.tile_rows * t_.tile_columns, inside = tile % of_image;
    return {tile / of_image, inside / t_.tile_columns * kTileRows,
            inside % t_.tile_columns * kTileColumns};
  }

  void combine_inputs(int64_t tile, int64_t i, int64_t group) {
    const Place at = place(tile);
    const int64_t channels = p_.groups * p_.inputs;
    const Stored* from = static_cast<const Stored*>(t_.x) +
                         at.image * p_.height * p_.width * channels + group * p_.inputs;
    // Null outside the image.
    const Stored* pixel[kDown][kAlong];
    for (int r = 0; r < kDown; ++r) {
      const int64_t row = at.row + r - 1;
      for (int c = 0; c < kAlong; ++c) {
        const int64_t column = at.column + c - 1;
        const bool inside = row >= 0 && row < p_.height && column >= 0 && column < p_.width;
        pixel[r][c] = inside ? from + (row * p_.width + column) * channels : nullptr;
      }
    }
    const bool whole =
        at.row > 0 && at.row + 2 < p_.height && at.column > 0 && at.column + 4 < p_.width;
    for (int64_t channel = 0; channel < p_.inputs; channel += kCount) {
      V d[kDown][kAlong];
#pragma GCC unroll 4
      for (int r = 0; r < kDown; ++r) {
        V x[kAlong];
#pragma GCC unroll 6
        for (int c = 0; c < kAlong; ++c) {
          x[c] = whole || pixel[r][c] ? load(pixel[r][c] + channel) : V{};
        }
        d[r][0] = (x[0] + x[4]) + (x[3] - x[1]) * 1.5f - x[2] * 2.f;
        d[r][1] = (x[4] - x[1]) * 2.f + x[2] + x[3] * 5.f;
        d[r][2] = x[2] * 5.f - (x[1] + x[4]) * 2.f - x[3];
        d[r][3] = (x[1] - x[3]) * 2.f + (x[2] - x[4]);
        d[r][4] = (x[4] - x[2]) * 2.f + (x[1] - x[3]);
        d[r][5] = (x[1] + x[5]) + (x[4] - x[2]) * 1.5f - x[3] * 2.f;
      }
      float* to = inputs_ + i * p_.inputs + channel;
      const int64_t step = plane(t_, p_.inputs);
#pragma GCC unroll 6
      for (int c = 0; c < kAlong; ++c) {
        store(to + c * step, d[0][c] - d[2][c]);
        store(to + (kAlong + c) * step, d[1][c] + d[2][c]);
        store(to + (2 * kAlong + c) * step, d[2][c] - d[1][c]);
        store(to + (3 * kAlong + c) * step, d[3][c] - d[1][c]);
      }
    }
  }

  void multiply(int64_t group) {
    const int64_t depth = p_.inputs, wide = wide_, columns = t_.panel;
    const int64_t panel_size = depth * columns;
    for (int point = 0; point < kPoints; ++point) {
      const float* left = inputs_ + point * plane(t_, depth);
      float* products = outputs_ + point * plane(t_, wide);
      const float* filter =
          t_.filters + ((group * kPoints + point) * t_.panels + first_panel_) * panel_size;
      const float* of_next_point = point + 1 < kPoints ? filter + t_.panels * panel_size : nullptr;
      for (int64_t panel = 0; panel < wide; panel += columns, filter += panel_size) {
        gemm(
            tiles_, columns, [=](int64_t row) { return left + row * depth; },
            {filter, depth, columns, panel + columns < wide ? filter + panel_size : of_next_point},
            [=](int64_t row, int64_t column, const V* sum, auto vectors) {
              float* to = products + row * wide + panel + column;
#pragma GCC unroll 4
              for (int v = 0; v < vectors.kCount; ++v) store(to + v * kCount, sum[v]);
            });
      }
    }
  }

  void combine_products(int64_t tile, int64_t i, int64_t group) {
    const Place at = place(tile);
    const int64_t channels = p_.groups * p_.outputs;
    const int64_t start = ((at.image * p_.height + at.row) * p_.width + at.column) * channels;
    const int64_t rows = p_.height - at.row, columns = p_.width - at.column;
    const int64_t begin = first_panel_ * t_.panel, step = plane(t_, wide_);
    const int64_t left = p_.outputs - begin, count = left < wide_ ? left : wide_;
    for (int64_t channel = 0; channel < count; channel += kCount) {
      const float* from = outputs_ + i * wide_ + channel;
      const int64_t c0 = group * p_.outputs + begin + channel;
      V y[kTileRows][kAlong];
#pragma GCC unroll 6
      for (int c = 0; c < kAlong; ++c) {
        const V m0 = load(from + c * step), m1 = load(from + (kAlong + c) * step);
        const V m2 = load(from + (2 * kAlong + c) * step);
        const V m3 = load(from + (3 * kAlong + c) * step);
        y[0][c] = m0 + m1 + m2;
        y[1][c] = m1 - m2 + m3;
      }
      const V bias = load(t_.affine.bias + c0), scale = load(t_.affine.scale + c0);
      const V shift = load(t_.affine.shift + c0);
#pragma GCC unroll 2
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= rows) break;
        const V *m = y[r], sum = m[1] + m[2], difference = m[1] - m[2];
        const V z[kTileColumns] = {
            m[0] + sum + m[3] + m[4],
            difference + m[3] * 0.5f - m[4] * 2.f,
            sum + m[3] * 0.25f + m[4] * 4.f,
            difference + m[3] * 0.125f - m[4] * 8.f + m[5],
        };
#pragma GCC unroll 4
        for (int c = 0; c < kTileColumns; ++c) {
          if (c >= columns) break;
          const int64_t element = start + (r * p_.width + c) * channels + c0;
          const V conv = z[c] + bias;
          V result = (conv < 0 ? V{} : conv) * scale + shift;
          if (t_.residual) {
            result += load(t_.affine.residual_scale + c0) *
                      load(static_cast<const Stored*>(t_.residual) + element);
          }
          store(static_cast<Stored*>(t_.z) + element, result);
        }
      }
    }
  }

  const FoldedConvTables& t_;
  const FoldedConvProblem& p_;
  // Of the task: its tiles, the first panel of its outputs, and how many columns they are.
  int64_t tiles_ = 0, first_panel_ = 0, wide_ = 0;
  float *inputs_, *outputs_;
};

template <class Stored>
void run_tasks(const FoldedConvTables& tables, int64_t begin, int64_t end, void* scratch) {
  Worker<Stored> worker(tables, scratch);
  for (int64_t task = begin; task < end; ++task) worker.run(task);
}

template <class Stored>
void epilogue_of(int64_t rows, int64_t channels, const FoldedConvAffine& affine, const void* from,
                 const void* more, void* to) {
  const auto *y = static_cast<const Stored*>(from), *residual = static_cast<const Stored*>(more);
  auto* z = static_cast<Stored*>(to);
  const auto one = [&](V bias, V scale, V shift, V factor, V conv, V other) {
    conv += bias;
    const V result = (conv < 0 ? V{} : conv) * scale + shift;
    return residual ? result + factor * other : result;
  };
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = 0;
    for (; i + kCount <= channels; i += kCount) {
      store(z + i,
            one(load(affine.bias + i), load(affine.scale + i), load(affine.shift + i),
                load(affine.residual_scale + i), load(y + i), residual ? load(residual + i) : V{}));
    }
    if (i < channels) {
      // The last few, in a vector of their own.
      const std::size_t count = static_cast<std::size_t>(channels - i);
      float numbers[4][kCount] = {};
      const float* const rows_of[4] = {affine.bias, affine.scale, affine.shift,
                                       affine.residual_scale};
      for (int n = 0; n < 4; ++n) {
        __builtin_memcpy(numbers[n], rows_of[n] + i, count * sizeof(float));
      }
      Stored values[kCount] = {}, others[kCount] = {};
      __builtin_memcpy(values, y + i, count * sizeof(Stored));
      if (residual) __builtin_memcpy(others, residual + i, count * sizeof(Stored));
      store(values, one(load(numbers[0]), load(numbers[1]), load(numbers[2]), load(numbers[3]),
                        load(values), load(others)));
      __builtin_memcpy(z + i, values, count * sizeof(Stored));
    }
    y += channels;
    z += channels;
    if (residual) residual += channels;
  }
}

std::size_t scratch_bytes(const FoldedConvTables& tables) {
  return Worker<float>::scratch_bytes(tables);
}

void run(const FoldedConvTables& tables, int64_t begin, int64_t end, void* scratch) {
  switch (tables.problem.dtype) {
    case DType::kFloat16:
      return run_tasks<Half>(tables, begin, end, scratch);
    case DType::kBFloat16:
      return run_tasks<BFloat16>(tables, begin, end, scratch);
    default:
      return run_tasks<float>(tables, begin, end, scratch);
  }
}

void epilogue(DType dtype, int64_t rows, int64_t channels, const FoldedConvAffine& affine,
              const void* y, const void* residual, void* z) {
  switch (dtype) {
    case DType::kFloat16:
      return epilogue_of<Half>(rows, channels, affine, y, residual, z);
    case DType::kBFloat16:
      return epilogue_of<BFloat16>(rows, channels, affine, y, residual, z);
    default:
      return epilogue_of<float>(rows, channels, affine, y, residual, z);
  }
}

}  // namespace

constexpr int kNarrow = kGemmVectors < 2 ? kGemmVectors : 2;

extern const FoldedConvKernels folded_conv_kernels = {{kGemmVectors * kCount, kGemmRows},
                                                      {kNarrow * kCount, kGemmRowsOf<kNarrow>},
                                                      &scratch_bytes,
                                                      &run,
                                                      &epilogue};

}  // namespace CA3D_ISA
}  // namespace ca3d
