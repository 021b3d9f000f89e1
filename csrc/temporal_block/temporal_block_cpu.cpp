// CPU kernels of the folded temporal half, compiled once per instruction set.
//
// A task works on the frames of some pixels for one head; its rows stay in the first and second
// cache. A convolution computes tiles of four frames by Winograd's F(4, 3): six linear combinations
// of six frames, each times a matrix, and four combinations of the products. Of the points 0, 1,
// -1, 1/2, -2 and infinity the errors are a few units in the last place; with 2 instead of 1/2 they
// are twice as large. Between two convolutions the frames stay in registers, but for those that are
// added later: what goes through memory are the combinations and, where they are not computed at
// once in their place, the products. In clips of one or two frames, frames lie one after the other,
// with zeros before the first and after the last, so that the three frames under a filter are one
// row of a matrix as they lie there, and the convolution is one product.
#include "common/gemm.h"
#include "common/scratch.h"
#include "common/simd.h"
#include "temporal_block/temporal_block.h"

namespace ca3d {
namespace CA3D_ISA {
namespace {

constexpr int kCount = kLanes<float>;
constexpr int64_t kPoints = kTemporalBlockPoints, kTileFrames = 4;
using V = Vector<float>;

template <class Stored>
void read_row(const Stored* from, int64_t columns, int64_t padded, float* to) {
  int64_t i = 0;
  for (; i + kCount <= columns; i += kCount) store(to + i, load(from + i));
  for (; i < padded; i += kCount) {
    Stored rest[kCount] = {};
    if (i < columns) __builtin_memcpy(rest, from + i, (columns - i) * sizeof(Stored));
    store(to + i, load(rest));
  }
}

// The first `columns` lanes of x, as far as it has so many.
template <class Stored>
void write(V x, int64_t columns, Stored* to) {
  if (columns >= kCount) {
    store(to, x);
  } else if (columns > 0) {
    Stored rest[kCount];
    store(rest, x);
    __builtin_memcpy(to, rest, columns * sizeof(Stored));
  }
}

template <class Stored>
void write_row(const float* from, int64_t columns, Stored* to) {
  for (int64_t i = 0; i < columns; i += kCount) write(load(from + i), columns - i, to + i);
}

template <class Stored>
void widen_rows(const void* from, int64_t rows, int64_t columns, int64_t padded, float* to) {
  const auto* row = static_cast<const Stored*>(from);
  for (int64_t r = 0; r < rows; ++r) read_row(row + r * columns, columns, padded, to + r * padded);
}

// Sums over the lanes of kQueries vectors dot(first), ...: lane i of the result is the sum of
// vector i % kQueries.
template <int kQueries, class Dot>
inline V lane_sums(int64_t first, const Dot& dot) {
  if constexpr (kQueries == 1) {
    return dot(first);
  } else {
    constexpr int kHalf = kQueries / 2;
    return pair_sums<kHalf, float>(lane_sums<kHalf>(first, dot),
                                   lane_sums<kHalf>(first + kHalf, dot));
  }
}

template <class Stored>
class Worker {
 public:
  Worker(const TemporalBlockTables& tables, void* memory)
      : t_(tables), dim_(tables.padded_dim), scratch_(memory) {
    const int64_t rows = t_.block_pixels * t_.frames;
    const int64_t padded_rows = t_.block_pixels * t_.padded_frames;
    lanes_ = (rows + kCount - 1) / kCount * kCount;
    x_ = scratch_.take<float>(t_.group_heads * rows * dim_);
    qkv_ = scratch_.take<float>(t_.group_heads * rows * 3 * dim_);
    y_ = scratch_.take<float>(padded_rows * dim_);
    if (t_.points == kPoints) {
      // The odd line keeps the points' rows out of one set of a cache.
      plane_ = t_.block_pixels * t_.tiles * dim_ + kCacheLine;
      tiles_ = scratch_.take<float>(kPoints * plane_);
      products_ = gemm_at_once(dim_) ? tiles_ : scratch_.take<float>(kPoints * plane_);
    } else {
      u_ = scratch_.take<float>(padded_rows * dim_);
    }
    scores_ = scratch_.take<float>(t_.slots * lanes_);
    visible_ = scratch_.take<float>(lanes_);
    zeros_ = scratch_.take<float>(lanes_);
    key_ = scratch_.take<int64_t>(t_.slots * lanes_);
    frame_ = scratch_.take<int64_t>(lanes_);
    padded_ = scratch_.take<int64_t>(lanes_);
    x_pixel_ = scratch_.take<int64_t>(t_.block_pixels);
    out_pixel_ = scratch_.take<int64_t>(t_.block_pixels);
  }

  std::size_t scratch_bytes() const { return scratch_.used(); }

  // What is the same for all tasks; outside the clip it stays zero.
  void start() {
    const int64_t count = t_.block_pixels * t_.padded_frames * dim_;
    for (int64_t i = 0; i < count; ++i) y_[i] = 0;
    if (u_) {
      for (int64_t i = 0; i < count; ++i) u_[i] = 0;
    }
    for (int64_t row = 0; row < lanes_; ++row) {
      frame_[row] = row % t_.frames;
      padded_[row] = (row / t_.frames * t_.padded_frames + frame_[row]) * dim_;
    }
    rows_ = t_.block_pixels * t_.frames;
    if (t_.group_heads == 1) look_up_keys(0);
  }

  void run(int64_t task) {
    const int64_t group = task / t_.blocks, first = task % t_.blocks * t_.block_pixels;
    const int64_t left = t_.pixels - first;
    pixels_ = left < t_.block_pixels ? left : t_.block_pixels;
    rows_ = pixels_ * t_.frames;
    for (int64_t i = 0; i < pixels_; ++i) {
      const int64_t outer = (first + i) / t_.inner, inner = (first + i) % t_.inner;
      x_pixel_[i] = outer * t_.x.outer + inner * t_.x.inner;
      out_pixel_[i] = outer * t_.out.outer + inner * t_.out.inner;
    }
    for (int64_t member = 0; member < t_.group_heads; ++member) {
      project(group * t_.group_heads + member, member);
    }
    for (int64_t member = 0; member < t_.group_heads; ++member) {
      const int64_t head = group * t_.group_heads + member;
      if (t_.group_heads > 1) look_up_keys(head);
      attend(head, member);
      if (t_.points == kPoints && t_.convolutions > 0) {
        convolve_tiles(head);
      } else {
        for (int64_t i = 0; i < t_.convolutions; i += 2) {
          convolve<false>(head, i, y_, u_);
          convolve<true>(head, i + 1, u_, y_);
        }
        for (int64_t row = 0; row < rows_; ++row) {
          write_row(y_ + padded_[row] + dim_, t_.head_dim,
                    out_of(head, row / t_.frames) + frame_[row] * t_.out.frame);
        }
      }
    }
  }

 private:
  // The first frame of a pixel of the task, at the head's channels.
  const Stored* x_of(int64_t head, int64_t pixel) const {
    return static_cast<const Stored*>(t_.x.data) + x_pixel_[pixel] + head * t_.head_dim;
  }
  Stored* out_of(int64_t head, int64_t pixel) const {
    return static_cast<Stored*>(t_.out.data) + out_pixel_[pixel] + head * t_.head_dim;
  }

  static const float* of(const TemporalBlockMatrix& m, int64_t head, int64_t i = 0) {
    return m.data + head * m.head + i * m.step;
  }

  // The filters of convolution i, or null behind the last one.
  const float* filter_of(int64_t head, int64_t i) const {
    return i < t_.convolutions ? of(t_.filters, head, i) : nullptr;
  }

  // Where the keys are that each query of a head meets. Behind the last row, lanes without a query
  // repeat it.
  void look_up_keys(int64_t head) {
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const int64_t row = lane < rows_ ? lane : rows_ - 1;
      const int64_t entry = head * t_.frames + frame_[row];
      visible_[lane] = t_.visible[entry];
      zeros_[lane] = t_.zeros[entry];
      for (int64_t slot = 0; slot < t_.slots; ++slot) {
        const int64_t found = t_.key_row[entry * t_.slots + slot];
        const int64_t member = found / t_.frames, frame = found % t_.frames;
        key_[slot * lanes_ + lane] = (member * rows_ + row - frame_[row] + frame) * 3 * dim_;
      }
    }
  }

  void project(int64_t head, int64_t member) {
    float* x = x_ + member * rows_ * dim_;
    for (int64_t row = 0; row < rows_; ++row) {
      read_row(x_of(head, row / t_.frames) + frame_[row] * t_.x.frame, t_.head_dim, dim_,
               x + row * dim_);
    }
    float* qkv = qkv_ + member * rows_ * 3 * dim_;
    const float* bias = of(t_.qkv_bias, head);
    const int64_t dim = dim_, *frame = frame_;
    gemm(
        rows_, 3 * dim, [=](int64_t row) { return x + row * dim; },
        {of(t_.qkv_weight, head), t_.head_dim, 3 * dim, nullptr},
        [=](int64_t row, int64_t column, const V* sum, auto vectors) {
          const float* summand = bias + frame[row] * 3 * dim + column;
          float* to = qkv + row * 3 * dim + column;
#pragma GCC unroll 4
          for (int v = 0; v < vectors.kCount; ++v) {
            store(to + v * kCount, sum[v] + load(summand + v * kCount));
          }
        });
  }

  // y = norm_scale (x + attention) + norm_shift.
  void attend(int64_t head, int64_t member) {
    const float* q = qkv_ + member * rows_ * 3 * dim_;
    for (int64_t first = 0; first < rows_; first += kCount) {
      for (int64_t slot = 0; slot < t_.slots; ++slot) {
        const V dots = lane_sums<kCount>(first, [&](int64_t lane) {
          const float* left = q + (lane < rows_ ? lane : rows_ - 1) * 3 * dim_;
          const float* right = qkv_ + key_[slot * lanes_ + lane] + dim_;
          V sum = {};
          for (int64_t i = 0; i < dim_; i += kCount) sum += load(left + i) * load(right + i);
          return sum;
        });
        store(scores_ + slot * lanes_ + first, dots);
      }
      softmax(first);
    }
    const float *scale = of(t_.norm_scale, head), *shift = of(t_.norm_shift, head);
    for (int64_t row = 0; row < rows_; ++row) {
      const float* x = x_ + (member * rows_ + row) * dim_;
      const float* summand = shift + frame_[row] * dim_;
      float* to = y_ + padded_[row] + dim_;
      int64_t i = 0;
      for (; i + 4 * kCount <= dim_; i += 4 * kCount) attended<4>(row, i, x, scale, summand, to);
      for (; i < dim_; i += kCount) attended<1>(row, i, x, scale, summand, to);
    }
  }

  // Columns i .. i + kVectors * kCount - 1 of a row of y.
  template <int kVectors>
  void attended(int64_t row, int64_t i, const float* x, const float* scale, const float* shift,
                float* to) const {
    V sum[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = V{};
    const int64_t seen = static_cast<int64_t>(visible_[row]);
    for (int64_t slot = 0; slot < seen; ++slot) {
      const float weight = scores_[slot * lanes_ + row];
      const float* value = qkv_ + key_[slot * lanes_ + row] + 2 * dim_ + i;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * load(value + v * kCount);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kCount;
      store(to + at, (load(x + at) + sum[v]) * load(scale + at) + load(shift + at));
    }
  }

  // Turns the scores of a vector of queries into probabilities; slots that don't exist get 0.
  void softmax(int64_t first) {
    const V visible = load(visible_ + first), zeros = load(zeros_ + first);
    const V nothing = broadcast(-static_cast<float>(__builtin_inf()));
    V largest = zeros > 0 ? V{} : nothing;
    float* score = scores_ + first;
    for (int64_t j = 0; j < t_.slots; ++j) {
      const V x = visible > static_cast<float>(j) ? load(score + j * lanes_) * t_.scale : nothing;
      largest = max<float>(x, largest);
      store(score + j * lanes_, x);
    }
    const V at_zero = zeros * exp_of_nonpositive<float>(-largest);
    V total = zeros > 0 ? at_zero : V{};
    for (int64_t j = 0; j < t_.slots; ++j) {
      const V x = exp_of_nonpositive<float>(load(score + j * lanes_) - largest);
      total += x;
      store(score + j * lanes_, x);
    }
    for (int64_t j = 0; j < t_.slots; ++j) {
      store(score + j * lanes_, load(score + j * lanes_) / total);
    }
  }

  // What follows the sums of a convolution, at some vectors of columns.
  struct Step {
    Step(const TemporalBlockTables& t, int64_t head, int64_t i)
        : bias(of(t.column_bias, head, i)),
          scale(of(t.column_scale, head, i)),
          shift(of(t.column_shift, head, i)) {}

    // to (+)= scale relu(sum + bias) + shift.
    template <bool kAdd>
    void finish(V sum, int64_t column, float* to) const {
      const V z = sum + load(bias + column);
      V result = (z < 0 ? V{} : z) * load(scale + column) + load(shift + column);
      if (kAdd) result += load(to);
      store(to, result);
    }

    const float *bias, *scale, *shift;
  };

  // Frame by frame: a row of frames t - 1, t and t + 1 times a matrix.
  template <bool kAdd>
  void convolve(int64_t head, int64_t i, const float* from, float* to) {
    const Step step(t_, head, i);
    const int64_t dim = dim_, *padded = padded_;
    gemm(
        rows_, dim, [=](int64_t row) { return from + padded[row]; },
        {of(t_.filters, head, i), 3 * dim, dim, filter_of(head, i + 1)},
        [=, &step](int64_t row, int64_t column, const V* sum, auto vectors) {
          float* into = to + padded[row] + dim + column;
#pragma GCC unroll 4
          for (int v = 0; v < vectors.kCount; ++v) {
            step.template finish<kAdd>(sum[v], column + v * kCount, into + v * kCount);
          }
        });
  }

  // Four frames at a time.
  void convolve_tiles(int64_t head) {
    for (int64_t pixel = 0; pixel < pixels_; ++pixel) combine_frames(pixel);
    for (int64_t i = 0; i < t_.convolutions; ++i) {
      multiply(head, i);
      const Step step(t_, head, i);
      const bool last = i + 1 == t_.convolutions;
      for (int64_t pixel = 0; pixel < pixels_; ++pixel) {
        if (last) {
          combine_products<true, true>(head, pixel, step);
        } else if (i % 2 == 1) {
          combine_products<true, false>(head, pixel, step);
        } else {
          combine_products<false, false>(head, pixel, step);
        }
      }
    }
  }

  // The frames under a tile: the one before, its four, and the one behind.
  struct Frames {
    V before = {}, own[kTileFrames] = {};

    // Writes the combinations, to each point's plane, and goes on to the next tile.
    void combine(const V* next, float* to, int64_t plane) {
      const V d0 = before, d1 = own[0], d2 = own[1], d3 = own[2], d4 = own[3], d5 = next[0];
      const V a = d1 - d3, b = d2 - d4;
      store(to, (d0 + d4) - a * 1.5f - d2 * 2.f);
      store(to + plane, (d4 - d1) * 2.f + d2 + d3 * 5.f);
      store(to + 2 * plane, d2 * 5.f - (d1 + d4) * 2.f - d3);
      store(to + 3 * plane, a * 2.f + b);
      store(to + 4 * plane, a - b * 2.f);
      store(to + 5 * plane, (d1 + d5) - b * 1.5f - d3 * 2.f);
      go_on(next);
    }

    void go_on(const V* next) {
      before = own[kTileFrames - 1];
#pragma GCC unroll 4
      for (int f = 0; f < kTileFrames; ++f) own[f] = next[f];
    }
  };

  // The combinations of y, for the first convolution.
  void combine_frames(int64_t pixel) {
    const float* y = y_ + (pixel * t_.padded_frames + 1) * dim_;
    float* to = tiles_ + pixel * t_.tiles * dim_;
    const V none[kTileFrames] = {};
    for (int64_t c = 0; c < dim_; c += kCount) {
      Frames frames;
      for (int64_t tile = 0; tile < t_.tiles; ++tile) {
        V next[kTileFrames];
#pragma GCC unroll 4
        for (int f = 0; f < kTileFrames; ++f) {
          next[f] = load(y + (tile * kTileFrames + f) * dim_ + c);
        }
        if (tile == 0) {
          frames.go_on(next);
        } else {
          frames.combine(next, to + (tile - 1) * dim_ + c, plane_);
        }
      }
      frames.combine(none, to + (t_.tiles - 1) * dim_ + c, plane_);
    }
  }

  void multiply(int64_t head, int64_t i) {
    const int64_t dim = dim_;
    for (int64_t point = 0; point < kPoints; ++point) {
      const float *left = tiles_ + point * plane_,
                  *filter = of(t_.filters, head, i) + point * dim * dim;
      float* products = products_ + point * plane_;
      gemm(
          pixels_ * t_.tiles, dim, [=](int64_t row) { return left + row * dim; },
          {filter, t_.head_dim, dim,
           point + 1 < kPoints ? filter + dim * dim : filter_of(head, i + 1)},
          [=](int64_t row, int64_t column, const V* sum, auto vectors) {
#pragma GCC unroll 4
            for (int v = 0; v < vectors.kCount; ++v) {
              store(products + row * dim + column + v * kCount, sum[v]);
            }
          });
    }
  }

  // From a pixel's products to its frames, with y's if they are to be added, and on to the
  // combinations that the next convolution multiplies, or to the output.
  template <bool kAdd, bool kLast>
  void combine_products(int64_t head, int64_t pixel, const Step& step) {
    float* y = y_ + (pixel * t_.padded_frames + 1) * dim_;
    const float* from = products_ + pixel * t_.tiles * dim_;
    float* to = tiles_ + pixel * t_.tiles * dim_;
    Stored* out = kLast ? out_of(head, pixel) : nullptr;
    const int64_t dim = dim_, plane = plane_, tiles = t_.tiles, whole = t_.frames / kTileFrames;
    for (int64_t c = 0; c < dim; c += kCount) {
      const V bias = load(step.bias + c), scale = load(step.scale + c);
      const V shift = load(step.shift + c);
      Frames frames;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* m = from + tile * dim + c;
        float* own = y + tile * kTileFrames * dim + c;
        // Each of the four sums holds this product once, so that it can bring the bias.
        const V m1 = load(m + plane) + bias;
        const V m2 = load(m + 2 * plane), m3 = load(m + 3 * plane), m4 = load(m + 4 * plane);
        const V sum = m1 + m2, difference = m1 - m2;
        V z[kTileFrames] = {
            load(m) + sum + m3 + m4,
            difference + m3 * 0.5f - m4 * 2.f,
            sum + m3 * 0.25f + m4 * 4.f,
            difference + m3 * 0.125f - m4 * 8.f + load(m + 5 * plane),
        };
#pragma GCC unroll 4
        for (int f = 0; f < kTileFrames; ++f) {
          z[f] = max<float>(V{}, z[f]) * scale + shift;  // NaN stays
          if (kAdd) z[f] += load(own + f * dim);
        }
        if (kLast) {
          write_tile(z, tile, c, out);
          continue;
        }
        if (tile == whole) {
#pragma GCC unroll 4
          for (int f = 0; f < kTileFrames; ++f) {
            if (tile * kTileFrames + f >= t_.frames) z[f] = V{};
          }
        }
        if (kAdd) {
#pragma GCC unroll 4
          for (int f = 0; f < kTileFrames; ++f) store(own + f * dim, z[f]);
        }
        if (tile == 0) {
          frames.go_on(z);
        } else {
          frames.combine(z, to + (tile - 1) * dim + c, plane);
        }
      }
      const V none[kTileFrames] = {};
      if (!kLast) frames.combine(none, to + (tiles - 1) * dim + c, plane);
    }
  }

  // Columns from c on of a tile of the output, as far as there are such frames and columns.
  void write_tile(const V* z, int64_t tile, int64_t c, Stored* out) const {
    const int64_t first = tile * kTileFrames, step = t_.out.frame;
    Stored* row = out + first * step + c;
    if (first + kTileFrames <= t_.frames && c + kCount <= t_.head_dim) {
#pragma GCC unroll 4
      for (int f = 0; f < kTileFrames; ++f) store(row + f * step, z[f]);
    } else {
#pragma GCC unroll 4
      for (int f = 0; f < kTileFrames; ++f) {
        if (first + f < t_.frames) write(z[f], t_.head_dim - c, row + f * step);
      }
    }
  }

  const TemporalBlockTables& t_;
  // Of the task: its pixels, and their frames.
  int64_t dim_, lanes_, plane_ = 0, pixels_ = 0, rows_ = 0;
  Scratch scratch_;
  float *x_, *qkv_, *y_, *u_ = nullptr, *tiles_ = nullptr, *products_ = nullptr;
  float *scores_, *visible_, *zeros_;
  int64_t *key_, *frame_, *padded_, *x_pixel_, *out_pixel_;
};

std::size_t scratch_bytes(const TemporalBlockTables& tables) {
  return Worker<float>(tables, nullptr).scratch_bytes();
}

template <class Stored>
void run_tasks(const TemporalBlockTables& tables, int64_t begin, int64_t end, void* scratch) {
  Worker<Stored> worker(tables, scratch);
  worker.start();
  for (int64_t task = begin; task < end; ++task) worker.run(task);
}

void run(const TemporalBlockTables& tables, int64_t begin, int64_t end, void* scratch) {
  switch (tables.dtype) {
    case DType::kFloat16:
      return run_tasks<Half>(tables, begin, end, scratch);
    case DType::kBFloat16:
      return run_tasks<BFloat16>(tables, begin, end, scratch);
    default:
      return run_tasks<float>(tables, begin, end, scratch);
  }
}

void widen(DType dtype, const void* from, int64_t rows, int64_t columns, int64_t padded_columns,
           float* to) {
  switch (dtype) {
    case DType::kFloat16:
      return widen_rows<Half>(from, rows, columns, padded_columns, to);
    case DType::kBFloat16:
      return widen_rows<BFloat16>(from, rows, columns, padded_columns, to);
    default:
      return widen_rows<float>(from, rows, columns, padded_columns, to);
  }
}

void filters(DType dtype, const void* from, int64_t head_dim, int64_t padded_dim, int64_t points,
             float* scratch, float* to) {
  const int64_t matrix = padded_dim * padded_dim;
  float* wide = points == kPoints ? scratch : to;
  const int64_t bytes = (dtype == DType::kFloat32 ? 4 : 2) * head_dim * head_dim;
  for (int64_t tap = 0; tap < 3; ++tap) {
    widen(dtype, static_cast<const char*>(from) + tap * bytes, head_dim, head_dim, padded_dim,
          wide + tap * matrix);
    for (int64_t i = head_dim * padded_dim; i < matrix; ++i) wide[tap * matrix + i] = 0;
  }
  if (points != kPoints) return;
  for (int64_t i = 0; i < matrix; i += kCount) {
    const V g0 = load(wide + i), g1 = load(wide + matrix + i), g2 = load(wide + 2 * matrix + i);
    const V even = g0 + g2;
    store(to + i, g0);
    store(to + matrix + i, (even + g1) * (1 / 6.f));
    store(to + 2 * matrix + i, (even - g1) * (1 / 6.f));
    store(to + 3 * matrix + i, (g0 * 4.f + g1 * 2.f + g2) * (4 / 15.f));
    store(to + 4 * matrix + i, (g2 * 4.f - g1 * 2.f + g0) * (1 / 30.f));
    store(to + 5 * matrix + i, g2);
  }
}

}  // namespace

extern const TemporalBlockKernels temporal_block_kernels = {kGemmRows, &scratch_bytes, &run, &widen,
                                                            &filters};

}  // namespace CA3D_ISA
}  // namespace ca3d
